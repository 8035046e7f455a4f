"""What the end-to-end benchmarks score and with what: studies of the shared transcripts, models drawn here, and the
providers that score the ones under the others: the study's procedure, a careful user's, psykern.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from harness import CPU, PeakMemory, Timing, available_bytes
from safetensors.torch import save_file
from shapes import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from psykern import demo
from psykern.core.errors import RowError
from psykern.core.settings import MIN_SHARE, Settings
from psykern.core.types import EncodedTranscript, Transcript
from psykern.data.dataset import Dataset
from psykern.data.encode import Encoder
from psykern.data.read import read
from psykern.data.tokenizer import Tokenizer
from psykern.engine.budgets import CPU_BUDGETS, Budgets
from psykern.engine.engine import Engine
from psykern.engine.plan import Plan, plan
from psykern.models.foreign.model import ForeignModel
from psykern.models.model import Model

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

MIXES = {
    "full": {
        "frey2017mpl": 6,
        "guenther2024substitutions": 16,
        "thoma2025riskychoice": 40,
        "franke2024bayesian": 30,
        "jagadish2023zero": 3,
        "dezfouli2019": 1,
        "shahar2019twosteptask": 1,
    },
    "medium": {
        "frey2017mpl": 1,
        "guenther2024substitutions": 16,
        "thoma2025riskychoice": 10,
        "franke2024bayesian": 10,
        "jagadish2023zero": 1,
        "dezfouli2019": 1,
        "shahar2019twosteptask": 1,
    },
    "gpu": {  # about 0.3 million tokens, of every length
        "frey2017mpl": 12,
        "guenther2024substitutions": 64,
        "thoma2025riskychoice": 60,
        "franke2024bayesian": 30,
        "jagadish2023zero": 6,
        "dezfouli2019": 2,
        "shahar2019twosteptask": 3,
    },
    "demo": {"frey2017mpl": 1, "guenther2024substitutions": 2, "jagadish2023zero": 1},  # of the package's own sample
    "many": {"guenther2024substitutions": 200},
    "longest": {"dezfouli2019": 0},  # 0: the study's longest transcript alone, for peak memory
    "small": {"guenther2024substitutions": 4, "thoma2025riskychoice": 4, "franke2024bayesian": 3},
}


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    name: str
    transcripts: list[Transcript]
    encoded: list[EncodedTranscript]  # what the baselines are given

    @property
    def num_tokens(self) -> int:
        return sum(len(t.token_ids) for t in self.encoded)

    @property
    def num_responses(self) -> int:
        return sum(len(t.responses) for t in self.encoded)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """What a provider gives for a study. It is on the host, so a device has nothing left to do."""

    logprob: np.ndarray  # [scored tokens] float32, nats
    plan: Plan | None = None  # psykern's
    idle_share: float | None = None  # the engine's
    seconds: dict[str, float] = field(default_factory=dict)  # psykern's, by step; the others are given tokens


def make_checkpoint(folder: Path, layers: int) -> PreTrainedModel:
    """Random weights at the shape of Qwen2.5-0.5B, in a folder by the name of each dtype; the model in fp32."""
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        rope_theta=1_000_000.0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype).save_pretrained(folder / str(dtype))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(SHARED / "tokenizers" / "qwen3" / name, folder / str(dtype) / name)
    # Not the model at hand, whose rotary frequencies were rounded too.
    return AutoModelForCausalLM.from_pretrained(folder / "torch.float32", dtype=torch.float32).eval()


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def load_studies(mix: dict[str, int], tokenizer: Tokenizer, folder: Path = SHARED / "psych") -> list[Study]:
    encoder = Encoder(tokenizer, Settings())
    studies = []
    for name, count in mix.items():
        dataset = Dataset.find(folder / f"{name}.jsonl.gz", hashed=False)
        # The other providers score no options.
        transcripts = [replace(t, options=None) for t in accepted(read(dataset, limit=count or None))]
        if count == 0:
            transcripts = [max(transcripts, key=lambda t: len(t.text))]
        encoded = encoder.encode(transcripts)
        for error in encoded.rejects:
            raise error
        studies.append(Study(name, transcripts, list(encoded.transcripts)))
    return studies


def accepted(rows: Iterable[Transcript | RowError]) -> Iterator[Transcript]:
    """The rows; raises the first that is refused."""
    for row in rows:
        if isinstance(row, RowError):
            raise row
        yield row


@torch.inference_mode()
def run_study_procedure(model: PreTrainedModel, study: Study) -> Scored:
    scores = []
    for t in study.encoded:
        ids = torch.from_numpy(t.token_ids.astype(np.int64))
        labels = torch.full_like(ids, -100)
        for start, end in t.spans_tok.tolist():
            labels[start:end] = ids[start:end]
        ids, labels = ids[None].to(model.device), labels.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        # Cross-entropy makes a second array of all logits; where that cannot fit, it is spared the copy.
        step = len(logits) if logits.is_cuda or logits.nbytes * 1.1 < available_bytes() else 1024
        nll = [
            torch.nn.functional.cross_entropy(logits[i : i + step], labels[1 + i : 1 + i + step], reduction="none")
            for i in range(0, len(logits), step)
        ]
        scores.append(-torch.cat(nll)[labels[1:] != -100])
    return Scored(torch.cat(scores).float().cpu().numpy())


@torch.inference_mode()
def run_careful_user(model: PreTrainedModel, study: Study) -> Scored:
    scores = []
    for t in study.encoded:
        ids = torch.from_numpy(t.token_ids.astype(np.int64))[None].to(model.device)
        targets = np.concatenate([np.arange(start, end) for start, end in t.spans_tok.tolist()])
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, targets - 1]
        logprobs = torch.log_softmax(model.lm_head(hidden).float(), dim=-1)  # else bf16 would round them to 1/16
        scores.append(logprobs.gather(1, ids[0, targets][:, None])[:, 0])
    return Scored(torch.cat(scores).float().cpu().numpy())


def run_psykern(
    model: Model | ForeignModel,
    study: Study,
    tokenizer: Tokenizer,
    min_share: int = MIN_SHARE,
    budgets: Budgets = CPU_BUDGETS,
) -> Scored:
    start = time.perf_counter()
    encoded = Encoder(tokenizer, Settings()).encode(study.transcripts).transcripts
    tokenized = time.perf_counter()
    planned = plan(
        encoded,
        wave_tokens=budgets.wave_tokens,
        batch_tokens=budgets.batch_tokens,
        carried_price=budgets.carried_price,
        min_share=min_share,
    )
    engine, begun = Engine(model), time.perf_counter()
    logprob = engine.run(planned).logprob
    took = {"encode": tokenized - start, "plan": begun - tokenized, "engine": time.perf_counter() - begun}
    return Scored(logprob, planned, engine.idle_share, took)


def measure(run: Callable[[], Scored], repeats: int, device: torch.device = CPU) -> tuple[Scored, Timing, int]:
    """What the last of the runs gave, how long they took, and the bytes that they held at most."""
    seconds = []
    with PeakMemory(device).watch() as peak:
        for _ in range(repeats):
            start = time.perf_counter()
            scored = run()
            seconds.append(time.perf_counter() - start)
    return scored, Timing.of(seconds), peak.bytes


def together(name: str, studies: Sequence[Study]) -> Study:
    return Study(name, [t for s in studies for t in s.transcripts], [t for s in studies for t in s.encoded])


def shortest_of(study: Study) -> Study:
    """The study's shortest transcript alone."""
    index = min(range(len(study.encoded)), key=lambda i: len(study.encoded[i].token_ids))
    return Study(study.name, [study.transcripts[index]], [study.encoded[index]])


def make_shape(folder: Path, options: argparse.Namespace, dtype: torch.dtype) -> PreTrainedModel:
    """A model of a shape, drawn on the device; ``folder`` gets it, a shard a layer, and its tokenizer."""
    config = dict(SHAPES[options.shape])
    name = {"llama": "llama-3.1", "olmo3": "olmo-dolma2"}.get(config["model_type"], "qwen3")
    tokenizer = options.data / "tokenizers" / name
    source = tokenizer if tokenizer.is_dir() else demo.MODEL
    shutil.copy(source / "tokenizer.json", folder / "tokenizer.json")
    if options.quick:
        config |= {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
        config |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": Tokenizer.load(folder).size}
    torch.manual_seed(0)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
    model.config.save_pretrained(folder)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in model.state_dict().items():
        if key != "lm_head.weight" or not config["tie_word_embeddings"]:
            part = key.split(".")[2] if ".layers." in key else "outside"
            shards.setdefault(f"model-{part}.safetensors", {})[key] = tensor
    for file, tensors in shards.items():
        on_host = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
        save_file(on_host, folder / file, metadata={"format": "pt"})
    places = {key: file for file, tensors in shards.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return model.eval()
