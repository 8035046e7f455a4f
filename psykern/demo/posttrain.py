"""Makes the demo's second model: ``python -m psykern.demo.posttrain SHARED_PSYCH_FOLDER``.

It imitates what post-training does to a model's picture of people, so that a comparison has something to show: the
tiny model is trained a little further to give its own likeliest answer, whatever people answered. On the training
rows of :mod:`psykern.demo.train` (never the sample), the loss at each response token is the cross-entropy to the base
model's argmax there. Only the last layer's MLP, its norm and the final norm change, so that they alone are stored, in
bfloat16; :func:`psykern.demo.build_posttrained` puts them into a copy of the base model's folder.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import Qwen3ForCausalLM

from psykern.demo import MODEL, POSTTRAINED, build_posttrained
from psykern.demo.train import STUDIES, Corpus, Encoded, print_scores, read, split

SEED = 202
STEPS = 60
LR = 4e-4
WINDOW = 1024  # tokens
CHANGED = ("model.layers.3.mlp.", "model.layers.3.post_attention_layernorm.", "model.norm.")


def loss(model: Qwen3ForCausalLM, base: Qwen3ForCausalLM, transcript: Encoded) -> torch.Tensor:
    """Mean cross-entropy over response tokens, to the base model's likeliest token in each one's place (nats)."""
    ids, is_response = transcript
    rows = is_response[1:]  # the position before predicts a token
    with torch.no_grad():
        targets = base(input_ids=ids[None]).logits[0, :-1][rows].argmax(-1)
    return cross_entropy(model(input_ids=ids[None]).logits[0, :-1][rows], targets)


def posttrain(corpus: Corpus, steps: int) -> Qwen3ForCausalLM:
    """The base model with :data:`CHANGED` trained further."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    base, model = (Qwen3ForCausalLM.from_pretrained(MODEL, dtype=torch.float32) for _ in range(2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(CHANGED)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    studies = [study for study in STUDIES if study.in_sample]
    for step in range(steps):
        step_loss = torch.stack([loss(model, base, corpus.draw(study, WINDOW, rng)) for study in studies]).mean()
        optimizer.zero_grad()
        step_loss.backward()
        optimizer.step()
        if (step + 1) % 20 == 0:
            print(f"step {step + 1:4d}  {step_loss.item():.3f}", flush=True)
    return model.eval()


def main() -> None:
    """Writes the changed weights, and prints what base and post-trained model reach on the sample."""
    parser = argparse.ArgumentParser(description="make the demo's post-trained model")
    parser.add_argument("data", type=Path, help="folder with the studies' .jsonl.gz files")
    parser.add_argument("--out", type=Path, default=POSTTRAINED, help="file for the changed weights")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    torch.set_num_threads(1)

    splits = {study.name: split(read(args.data, study), study.num_held_out) for study in STUDIES if study.in_sample}
    rows = {name: training for name, (_, training) in splits.items()}
    held_out = frozenset(row.text for sample, _ in splits.values() for row in sample)
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    model = posttrain(Corpus(tokenizer, rows, held_out), args.steps)
    changed = {name: weight for name, weight in model.state_dict().items() if name.startswith(CHANGED)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.to(torch.bfloat16).contiguous() for name, weight in changed.items()}, args.out)
    args.out.chmod(0o644)
    with tempfile.TemporaryDirectory() as temporary:
        for path in (MODEL, build_posttrained(Path(temporary) / "posttrained", changed=args.out)):
            print(path.name)
            rounded = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for study in STUDIES:
                if study.in_sample:
                    print_scores(rounded, tokenizer, study, splits[study.name][0])


if __name__ == "__main__":
    main()
