"""Makes the demo's sample and its tiny model: ``python -m psykern.demo.train SHARED_PSYCH_FOLDER``.

The rule: of each study the transcripts whose text has the smallest SHA-256 are held out, and are the sample; a row is
training data only if neither its text nor its participant is held out. Tokenizer and model see training data alone.
Rows of the sample are the original bytes with one field added, ``options``, read off the text by the study's rule.

A step sees transcripts of one study, cut to windows that end with a response; windows grow in three stages up to whole
transcripts. Its loss is the mean over the tokens between the marks plus the mean over all other tokens (nats), so that
the few response tokens weigh as much as the prose around them. Where options are random letters, a transcript's letters
are permuted at every use. Attention starts as "look for the same token and copy it" (after Trockman & Kolter 2023,
"Mimetic initialization of self-attention layers"), without which copying a letter takes many times the steps.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from psykern.demo import MODEL, SAMPLE

Encoded = tuple[torch.Tensor, torch.Tensor]  # token ids [T] int64; which of them overlap a response [T] bool
Options = list[str] | list[list[str]] | None  # one list for all responses, or one for each; None: open responses

SEED = 201
STEPS = 700
TOKENS = 2560  # per step, about; a whole transcript may be longer
STAGES = ((0.55, 128), (0.80, 640), (1.0, 6144))  # until this part of the steps: longest window in tokens
PEAK_LR = 5e-3
VOCAB_SIZE = 2560
TOKENIZER_ROWS = 250  # of each study
CONTEXT = 6144  # tokens, more than any transcript of these studies has
RESPONSE = re.compile(r"<<(.*?)>>", re.DOTALL)
# Qwen's pre-tokenizer: " <<" and ">>" are words of their own, digits stand alone.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Study:
    """One study of the demo."""

    name: str
    num_held_out: int  # transcripts
    share: float  # of the training steps
    options: Callable[[str], Options]
    letters: str | None = None  # where letters stand that are permuted at every use
    in_sample: bool = True  # whether the held-out transcripts are shipped, as the sample


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a study's file."""

    line: bytes  # without the line break
    key: tuple[str, str]  # experiment, participant
    text: str


def ab_options(text: str) -> Options:
    """The two lotteries that the instructions name."""
    return list(re.findall(r"between lottery (\w) and lottery (\w)", text)[0])


def key_options(text: str) -> Options:
    """The keys of the slot machines, "1 to 6"."""
    first, last = re.findall(r"represented by the keys (\d) to (\d)", text)[0]
    return [str(key) for key in range(int(first), int(last) + 1)]


def named_options(pattern: str) -> Callable[[str], Options]:
    """A rule: the letters that ``pattern`` finds in the text between one response and the next."""

    def options(text: str) -> Options:
        trials = RESPONSE.split(text)[:-1:2]  # the text before each response
        found = [[letter for hit in re.findall(pattern, trial, re.M) for letter in hit] for trial in trials]
        return found[0] if all(letters == found[0] for letters in found) else found

    return options


def no_options(text: str) -> Options:
    """Open responses."""
    return None


STUDIES = (
    Study("frey2017mpl", 3, 0.08, ab_options),
    Study("jagadish2023zero", 2, 0.12, key_options),
    # Trained on and held out, but not shipped: of these two the tiny model does not beat guessing.
    Study(
        "thoma2025riskychoice", 10, 0.22, named_options(r"marked '(\w)' or marked '(\w)'"), r"'(\w)'|<<(\w)>>", False
    ),
    Study("franke2024bayesian", 10, 0.40, named_options(r"^(\w): "), r"^(\w): |<<(\w)>>", False),
    Study("guenther2024substitutions", 6, 0.18, no_options),
)


def read(folder: Path, study: Study) -> list[Row]:
    """All rows of a study that hold a response."""
    lines = gzip.decompress((folder / f"{study.name}.jsonl.gz").read_bytes()).splitlines()
    rows = [(line, json.loads(line)) for line in lines]
    return [
        Row(line, (str(row["experiment"]), str(row["participant"])), row["text"])
        for line, row in rows
        if RESPONSE.search(row["text"])
    ]


def split(rows: list[Row], num_held_out: int) -> tuple[list[Row], list[Row]]:
    """Sample and training rows, which share no text and no participant."""
    by_text = {row.text: row for row in reversed(rows)}
    order = sorted(by_text, key=lambda text: hashlib.sha256(text.encode()).digest())
    sample = [by_text[text] for text in order[:num_held_out]]
    texts, keys = {row.text for row in sample}, {row.key for row in sample}
    return sample, [row for row in rows if row.text not in texts and row.key not in keys]


def with_options(row: Row, study: Study) -> bytes:
    """The row's own bytes, with the field ``options`` added where responses are closed."""
    options = study.options(row.text)
    if options is None:
        return row.line
    return row.line.rstrip()[:-1] + b', "options": ' + json.dumps(options).encode() + b"}"


def reletter(text: str, pattern: str, rng: random.Random) -> str:
    """The text with its own letters permuted, in the places that ``pattern`` names."""
    letters = sorted({match[match.lastindex or 0] for match in re.finditer(pattern, text, re.M)})
    drawn = dict(zip(letters, rng.sample(letters, len(letters)), strict=True))

    def replace(match: re.Match[str]) -> str:
        letter = match[match.lastindex or 0]
        return match[0].replace(letter, drawn[letter])

    return re.sub(pattern, replace, text, flags=re.M)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE over the texts, cut at the marks so that no merge reaches across ``<<`` or ``>>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in re.split(r"(?<=<<)|(?=>>)|(?<=>>)", text))
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> Encoded:
    """Token ids and whether each token overlaps a response."""
    encoding = tokenizer.encode(text)
    is_response = torch.zeros(len(encoding.ids), dtype=torch.bool)
    for match in RESPONSE.finditer(text):
        tokens = [encoding.char_to_token(char) for char in range(*match.span(1))]
        is_response[[token for token in tokens if token is not None]] = True
    return torch.tensor(encoding.ids), is_response


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training rows by study, and the sample's texts, which permuted letters must not give by chance."""

    tokenizer: Tokenizer
    rows: dict[str, list[Row]]
    held_out: frozenset[str]
    encoded: dict[str, Encoded] = field(default_factory=dict)  # of studies whose text never changes

    def draw(self, study: Study, longest: int, rng: random.Random) -> Encoded:
        """A random transcript; if it is longer than ``longest`` tokens, a window behind one of its responses."""
        text = rng.choice(self.rows[study.name]).text
        if study.letters is None:
            if text not in self.encoded:
                self.encoded[text] = encode(self.tokenizer, text)
            ids, is_response = self.encoded[text]
        else:
            permuted = reletter(text, study.letters, rng)
            while permuted in self.held_out:
                permuted = reletter(text, study.letters, rng)
            ids, is_response = encode(self.tokenizer, permuted)
        if len(ids) <= longest:
            return ids, is_response
        ends = (is_response[:-1] & ~is_response[1:]).nonzero().flatten().tolist()  # last token of each response
        end = rng.choice(ends) + 2  # with the closing mark
        start = max(0, end - longest)
        return ids[start:end], is_response[start:end]

    def batch(self, study: Study, longest: int, rng: random.Random) -> list[Encoded]:
        """Draws until there are at least ``TOKENS`` tokens."""
        drawn: list[Encoded] = []
        while sum(len(ids) for ids, _ in drawn) < TOKENS:
            drawn.append(self.draw(study, longest, rng))
        return drawn


def new_model(vocab_size: int) -> Qwen3ForCausalLM:
    """A small Qwen3 whose heads begin by matching equal tokens and copying them."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.09,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        use_cache=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        attention = layer.self_attn
        shape = (config.num_key_value_heads, config.head_dim, config.hidden_size)
        key, value = (  # one copy per query head, [Hq * Dh, D]
            weight.data.view(shape).repeat_interleave(attention.num_key_value_groups, 0).flatten(0, 1)
            for weight in (attention.k_proj.weight, attention.v_proj.weight)
        )
        attention.q_proj.weight.data.mul_(0.3).add_(key, alpha=0.7)
        attention.o_proj.weight.data.copy_(value.T)
    return model


def losses(model: Qwen3ForCausalLM, batch: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of all text tokens and of all response tokens of a batch, in nats."""
    longest = max(len(ids) for ids, _ in batch)
    input_ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    kind = torch.full((len(batch), longest), -1)  # -1 padding (on the right), 0 text, 1 response
    for i, (ids, is_response) in enumerate(batch):
        input_ids[i, : len(ids)] = ids
        kind[i, : len(ids)] = is_response.long()
    logits = model(input_ids=input_ids).logits[:, :-1]
    loss = cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
    kind = kind[:, 1:].flatten()
    return loss[kind == 0], loss[kind == 1]


def train(corpus: Corpus, steps: int) -> Qwen3ForCausalLM:
    """Trains a new model with AdamW, warm-up and a cosine schedule; prints mean losses in nats."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    model = new_model(corpus.tokenizer.get_vocab_size())
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    history: dict[str, list[tuple[float, float]]] = {study.name: [] for study in STUDIES}
    begin = time.perf_counter()
    for step in range(steps):
        decay = 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1.0, (step + 1) / (0.05 * steps)) * decay
        study = rng.choices(STUDIES, [study.share for study in STUDIES])[0]
        longest = next(window for until, window in STAGES if step < until * steps)
        text_loss, response_loss = (loss.mean() for loss in losses(model, corpus.batch(study, longest, rng)))
        (text_loss + response_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history[study.name].append((text_loss.item(), response_loss.item()))
        if (step + 1) % 50 == 0:
            print_losses(step + 1, time.perf_counter() - begin, history)
    return model.eval()


def print_losses(step: int, seconds: float, history: dict[str, list[tuple[float, float]]]) -> None:
    """One line: mean loss per text token and per response token over each study's last ten steps."""
    means = {
        name: [sum(column) / len(column) for column in zip(*past[-10:], strict=True)] for name, past in history.items()
    }
    shown = "  ".join(
        f"{name[:8]} {text:.2f} {response:.2f}" for name, (text, response) in means.items() if means[name]
    )
    print(f"step {step:4d} {seconds:4.0f} s  {shown}", flush=True)


def per_response(options: Options, count: int) -> list[list[str]]:
    """The options of each response of a transcript with ``count`` responses; none where they are open."""
    if options is None:
        return []
    return [option for option in options if isinstance(option, list)] or [[str(option) for option in options]] * count


def print_scores(model: Qwen3ForCausalLM, tokenizer: Tokenizer, study: Study, sample: list[Row]) -> None:
    """Mean NLL of the sample's responses over the whole vocabulary, beside that of guessing among the options."""
    nll, count, uniform = 0.0, 0, 0.0
    for row in sample:
        responses = RESPONSE.findall(row.text)
        with torch.no_grad():
            nll += losses(model, [encode(tokenizer, row.text)])[1].sum().item()
        count += len(responses)
        uniform += sum(math.log(len(options)) for options in per_response(study.options(row.text), len(responses)))
    beside = f"uniform {uniform / count:.3f}" if uniform else "open"
    print(f"{study.name:28s} {count:5d} responses  NLL {nll / count:.3f}  {beside}", flush=True)


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """A model folder with weights rounded to bfloat16, so that it is half as large."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)  # the model is for scoring only
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name that transformers 4 knows too
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_sample(study: Study, sample: list[Row], folder: Path) -> None:
    """The study's file of the sample, after a check that every response is among its options."""
    for row in sample:
        responses = RESPONSE.findall(row.text)
        options = per_response(study.options(row.text), len(responses))
        if options and not all(map(list.__contains__, options, responses)):
            raise ValueError(f"{study.name} {row.key}: expected every response among its options")
    folder.mkdir(parents=True, exist_ok=True)
    lines = b"".join(with_options(row, study) + b"\n" for row in sample)
    (folder / f"{study.name}.jsonl.gz").write_bytes(gzip.compress(lines, 9, mtime=0))


def main() -> None:
    """Writes sample and model, and prints what the model reaches on the sample."""
    parser = argparse.ArgumentParser(description="make the demo's sample and tiny model")
    parser.add_argument("data", type=Path, help="folder with the studies' .jsonl.gz files")
    parser.add_argument("--sample", type=Path, default=SAMPLE)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    torch.set_num_threads(1)

    splits = {study.name: split(read(args.data, study), study.num_held_out) for study in STUDIES}
    rows = {name: training for name, (_, training) in splits.items()}
    for study in STUDIES:
        if study.in_sample:
            write_sample(study, splits[study.name][0], args.sample)
    tokenizer = train_tokenizer([row.text for name in rows for row in rows[name][:TOKENIZER_ROWS]])
    held_out = frozenset(row.text for sample, _ in splits.values() for row in sample)
    model = train(Corpus(tokenizer, rows, held_out), args.steps)
    save(model, tokenizer, args.model)
    rounded = Qwen3ForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    for study in STUDIES:
        print_scores(rounded, tokenizer, study, splits[study.name][0])


if __name__ == "__main__":
    main()
