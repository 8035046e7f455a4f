"""A model that streams from disk beside one of its layers in memory: same rows, same process.

    streamed   all layers, no byte of the weights in memory when it begins; the next layer is read ahead
    in memory  the first layer in the place of all others, warmed; before the streamed run and after it

Random weights in bf16 at the shape of Qwen3-8B (16.4 GB, in shards; written to ``--model`` once, and left there) and
real transcripts, as many as fit ``--tokens`` rows, computed in waves of the default budget. A layer's seconds are the
time between two reports of progress; the first layer, with the embedding before it, and the last one, which computes
response rows alone, are left out on both sides. ``share`` is the mean layer in memory over the mean one streamed.
``anonymous_mb`` is the process's own memory at most, sampled every 10 ms: mapped files are not in it. ``disk_gb_s`` is
what reading a part of the files from end to end gave just before; ``needed_gb_s`` what the streamed run took in.
``limit_gb`` is the memory that the process may have, a control group's limit included: what is below the weights' size
streams in every wave. Pages are dropped by posix_fadvise, which needs no rights.

Before anything is timed the shortest transcript must get the same bytes with and without reading ahead.

    python benchmarks/bench_streaming.py --model /tmp/8b [--dtypes float32 bfloat16] [--tokens 32768] [--name FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from harness import CPU, RESULTS, available_bytes, print_row, write_csv
from providers import SHARED, load_studies, shortest_of
from rates import begin_unheld
from safetensors.torch import save_file
from shapes import SHAPES

from psykern import demo
from psykern.core.types import EncodedTranscript
from psykern.data.tokenizer import Tokenizer
from psykern.engine.budgets import budgets
from psykern.engine.engine import Engine
from psykern.engine.plan import Plan, plan
from psykern.kernels.compute import Compute
from psykern.models.families import parse_spec
from psykern.models.model import Model
from psykern.models.readahead import ReadAhead

_SHARDS = 5  # as the published checkpoint has
_STUDY = "franke2024bayesian"
_REPEATED = 6  # layers of the model that repeats one
_QUICK = {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
_BLOCK = 1 << 23


def make_model(folder: Path, is_quick: bool) -> None:
    """Random weights; nothing where the folder is there already."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    tokenizer = SHARED / "tokenizers" / "qwen3"
    shutil.copy((tokenizer if tokenizer.is_dir() and not is_quick else demo.MODEL) / "tokenizer.json", folder)
    config: dict[str, Any] = {**SHAPES["Qwen3-8B"], "torch_dtype": "bfloat16"}
    if is_quick:
        config |= {**_QUICK, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": Tokenizer.load(folder).size}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = list(parse_spec(config, str(folder)).tensors().items())
    places: dict[str, str] = {}
    torch.manual_seed(0)
    for shard in range(_SHARDS):
        file = f"model-{shard + 1:05}-of-{_SHARDS:05}.safetensors"
        own = shapes[shard * len(shapes) // _SHARDS : (shard + 1) * len(shapes) // _SHARDS]
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) for name, shape in own}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def drop(folder: Path) -> None:
    """Whatever of the weights is in memory and not mapped."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(folder: Path) -> float:
    """Bytes a second, of a gigabyte of a shard that is not in memory."""
    drop(folder)
    buffer, count, start = bytearray(_BLOCK), 0, time.perf_counter()
    with min(folder.glob("*.safetensors")).open("rb", buffering=0) as file:
        while count < 1e9 and (read := file.readinto(buffer)):
            count += read
    return count / (time.perf_counter() - start)


def memory_limit() -> int:
    """Bytes: the limit of the process's control group, or what is available here where that is less."""
    limits = [available_bytes()]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kind, path = line.split(":", 2)
        for file in (f"/sys/fs/cgroup{path}/memory.max", f"/sys/fs/cgroup/memory{path}/memory.limit_in_bytes"):
            if kind in ("", "memory") and os.path.exists(file) and (text := Path(file).read_text().strip()).isdigit():
                limits.append(int(text))
    return min(limits)


class Anonymous:
    """The process's anonymous memory, at most."""

    def __init__(self) -> None:
        self.bytes = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        stop = threading.Event()

        def sample() -> None:
            while not stop.wait(0.01):
                status = Path("/proc/self/status").read_text()
                self.bytes = max(self.bytes, int(status.split("RssAnon:")[1].split()[0]) * 1024)

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def layer_seconds(model: Model, planned: Plan) -> list[float]:
    """Of each layer but the first and the last of each wave."""
    times: list[float] = []
    Engine(model).run(planned, lambda share: times.append(time.perf_counter()))
    reports = len(times) // planned.num_waves  # of a wave: its layers, and the whole
    taken = [b - a for a, b in pairwise(times)]
    return [taken[wave * reports + i] for wave in range(planned.num_waves) for i in range(model.num_layers - 2)]


def repeating_one(folder: Path, compute: Compute) -> Model:
    model = Model(folder, compute)
    model.spec = replace(model.spec, layers=model.spec.layers[:1] * _REPEATED)
    model._ahead = ReadAhead([[]])  # nothing
    return model


def check(folder: Path, compute: Compute, transcripts: Sequence[EncodedTranscript]) -> None:
    planned = plan(transcripts, wave_tokens=32_768, batch_tokens=2048)
    ahead = Engine(Model(folder, compute)).run(planned).logprob
    with patch.object(ReadAhead, "entered"):
        apart = Engine(Model(folder, compute)).run(planned).logprob
    if ahead.tobytes() != apart.tobytes() or not np.isfinite(ahead).all():
        raise SystemExit("reading ahead changes a score: refused")


def bench(folder: Path, dtype: str, transcripts: Sequence[EncodedTranscript]) -> dict[str, object]:
    compute = Compute.resolve("cpu", dtype)  # type: ignore[arg-type]
    own = budgets(Model(folder, compute).spec, CPU, compute.dtype)
    planned = plan(
        transcripts, wave_tokens=own.wave_tokens, batch_tokens=own.batch_tokens, carried_price=own.carried_price
    )
    rate, size = disk_rate(folder), sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    in_memory = layer_seconds(repeating_one(folder, compute), planned)[1:]
    model = Model(folder, compute)
    drop(folder)
    start, anonymous = time.perf_counter(), Anonymous()
    with anonymous.watch():
        streamed = layer_seconds(model, planned)
    seconds = time.perf_counter() - start
    in_memory += layer_seconds(repeating_one(folder, compute), planned)[1:]
    row: dict[str, object] = {
        "shape": "Qwen3-8B" if model.spec.hidden_size == 4096 else "tiny",
        "dtype": dtype,
        "weights_gb": round(size / 1e9, 2),
        "limit_gb": round(memory_limit() / 1e9, 1),
        "rows": planned.num_computed,
        "waves": planned.num_waves,
        "seconds": round(seconds, 2),
        "layer_seconds": round(float(np.mean(streamed)), 4),
        "layer_seconds_in_memory": round(float(np.mean(in_memory)), 4),
        "share": round(float(np.mean(in_memory) / np.mean(streamed)), 3),
        "share_of_medians": round(float(np.median(in_memory) / np.median(streamed)), 3),
        "anonymous_mb": round(anonymous.bytes / 1e6),
        "disk_gb_s": round(rate / 1e9, 2),
        "needed_gb_s": round(size * planned.num_waves / seconds / 1e9, 2),
    }
    print_row(row)
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the weights; made where it is not there")
    parser.add_argument("--small", action="store_true", help="a tiny shape and the package's own sample")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=32_768, help="of transcripts, at most; default: one wave")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the file goes")
    parser.add_argument("--name", help="of the CSV; default: no file")
    options = parser.parse_args(arguments)
    make_model(options.model, options.small)
    where = {"folder": demo.SAMPLE} if options.small else {}
    name = "guenther2024substitutions" if options.small else _STUDY
    (study,) = load_studies({name: 40}, Tokenizer.load(options.model), **where)
    ends = np.cumsum([len(t.token_ids) for t in study.encoded])
    transcripts = study.encoded[: max(1, int((ends <= options.tokens).sum()))]
    check(options.model, Compute.resolve("cpu", options.dtypes[-1]), shortest_of(study).encoded)
    rows = [bench(options.model, dtype, transcripts) for dtype in options.dtypes]
    if options.name:
        print(f"written: {write_csv(options.name, rows, options.folder)}")


if __name__ == "__main__":
    begin_unheld()
    main()
