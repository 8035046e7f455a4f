"""Predicts what an H100, an A100 and an H200 need for each operation, for a layer and for the whole of Psych-201, for
the study's models. **No hours are measured**: peaks are the makers' data sheets, and what share of them is reached is
assumed (:class:`Assumptions`), or, for an H200, was measured in a run of an 8B model (``MEASURED``).

An operation takes the longer of two times: its floating-point operations at the rate of the unit that does them, and
its bytes at the memory's bandwidth, each array read or written once. FLOPs are those of ``budgets.cost``: 2 for each
weight and row, 4 Hq Dh for each pair of a query and a key that it sees; the last layer computes queries, output
projection and MLP of the response rows only. Keys and values of a path that fit in half of the L2 cache are read from
memory once, larger ones once per tile of 128 queries. A model that does not fit the memory is streamed: each wave
waits for its weights through the link where computing it is shorter.

The dataset is Psych-201 as a whole (issue 4: 25,906,599 responses, 1.0e9 tokens, 3.4 % of them predicted, 8 % shared),
scored without options. How many keys a row sees follows from the 45 studies of ``STATISTICS.md``: all transcripts of a
study are taken to be as long as its median one. Rows that sharing saves see fewer keys than others, which is neglected.
Of a model with a mixture of experts there is the work of a layer's experts alone.

    python benchmarks/roofline.py [--models Qwen3-8B] [--batch-rows 16384] [--name roofline]
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shapes import SHAPES, model_spec, num_weights

from psykern.models.layer import LayerSpec
from psykern.models.spec import ModelSpec

RESULTS = Path(__file__).parent / "results"
SIZE = 2  # bytes of a bf16 number
QUERY_TILE = 128  # queries of a program of attention


@dataclass(frozen=True, slots=True)
class Device:
    """Data sheet: dense bf16 without sparsity, and what moves bytes."""

    name: str
    flops: float  # per second
    bandwidth: float  # bytes per second
    l2: float  # bytes
    memory: float  # bytes
    link: float  # bytes per second from the host


DEVICES = (
    Device("H100 SXM 80GB", flops=989e12, bandwidth=3.35e12, l2=50e6, memory=80e9, link=64e9),
    Device("A100 SXM 80GB", flops=312e12, bandwidth=2.0e12, l2=40e6, memory=80e9, link=32e9),
    Device("H200 SXM 141GB", flops=989e12, bandwidth=4.8e12, l2=60e6, memory=141e9, link=64e9),
)


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Shares of the data sheet that are taken to be reached; not measured."""

    gemm: float = 0.75  # bf16 products of thousands of rows through the vendor's library
    attention: float = 0.5  # two products with a softmax between them
    experts: float = 0.53  # grouped products: Liger's at Qwen3-30B-A3B's shape on an H100, 523 TFLOP/s; not psykern's
    bandwidth: float = 0.85  # of operations that only move bytes
    link: float = 0.8  # from pinned memory
    memory: float = 0.7  # that weights may take before they are streamed: psykern's own rule
    idle: float = 0.03  # of the time, in which the device waits for the host


# By device: products at 704 TFLOP/s, attention at 412, kernels always running, in results/profile_qwen3-8b_h200.csv;
# elementwise operations at 3.5 to 4.3 TB/s in rates_h200.csv. At its limit of 700 W all the while.
MEASURED = {"H200 SXM 141GB": Assumptions(gemm=0.71, attention=0.41, bandwidth=0.82, idle=0.004)}


@dataclass(frozen=True, slots=True)
class Dataset:
    """What is to be scored. ``lengths``: (transcripts, tokens of each) of its studies, or of a sample of them."""

    tokens: float
    computed_share: float  # of the tokens, after sharing
    response_share: float  # of the tokens: rows that predict one
    lengths: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> float:
        return self.tokens * self.computed_share

    @property
    def response_rows(self) -> float:
        return self.tokens * self.response_share

    def visible_keys(self, window: int | None) -> float:
        """Keys that a row sees in the mean: position p sees p + 1, under a window at most that many."""
        tokens = sum(n * length for n, length in self.lengths)
        keys = 0.0
        for n, length in self.lengths:
            near = min(length, window or length)
            keys += n * (near * (near + 1) / 2 + (length - near) * near)
        return keys / tokens


# (participants, median tokens) of each study: columns n and tokens of shared/data/psych/STATISTICS.md, in its order.
# fmt: off
STUDIES = (
    (3912, 4723), (99, 11570), (127, 8457), (125, 3550), (80, 7888), (91, 3404), (82, 2660), (101, 19248), (24, 9157),
    (302, 575), (1507, 3527), (1507, 3574), (1507, 4288), (146, 5183), (145, 5212), (400, 1370), (601, 4245),
    (281, 751), (80, 2386), (417, 2440), (878, 947), (174, 6994), (116, 9747), (151, 13100), (359, 5363), (3543, 3092),
    (171, 16072), (117, 7540), (151, 7888), (120, 7199), (1300, 8006), (300, 14004), (66, 6828), (74, 6128),
    (62, 4153), (588, 13982), (379, 8081), (554, 12220), (130, 7813), (282, 5836), (483, 4559), (301, 612),
    (1212, 543), (12, 5966), (79, 10740),
)
# fmt: on
PSYCH_201 = Dataset(tokens=1.0e9, computed_share=1 - 0.08, response_share=0.034, lengths=STUDIES)


@dataclass(frozen=True, slots=True)
class Work:
    """An operation on some rows."""

    op: str
    flops: float
    bytes: float
    unit: str  # whose rate the FLOPs have: "gemm", "attention" or "experts"; "" for what only moves bytes


def layer_work(
    layer: LayerSpec, rows: float, queries: float, keys: float, paths: float, l2: float = float("inf")
) -> list[Work]:
    """One layer for ``rows``, of which ``queries`` need an output; these see ``keys`` keys together.

    ``paths``: how many different paths the rows lie on, each of whose keys and values are read from memory; ``l2``:
    bytes of the cache.
    """
    mixer, hidden, inner = layer.mixer, layer.mixer.hidden_size, layer.ffn.intermediate_size
    q, kv = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
    path = 2 * keys / max(queries, 1)  # keys of a whole path, where the mean query stands in its middle
    fits = path * 2 * kv * SIZE <= l2 / 2
    keys_read = path * paths if fits else keys / QUERY_TILE
    results = queries * q + rows * 2 * kv
    works = [
        Work("qkv_proj", 2 * hidden * results, SIZE * (rows * hidden + hidden * (q + 2 * kv) + results), "gemm"),
        moved("norm_rope_store", queries * 2 * q + rows * 4 * kv),
        Work("attention", 4 * q * keys, SIZE * (2 * queries * q + 2 * kv * keys_read), "attention"),
        product("o_proj", queries, q, hidden),
        moved("add_rms_norm", queries * 4 * hidden),
        product("gate_up_proj", queries, hidden, 2 * inner),
        moved("silu_mul", queries * 3 * inner),
        product("down_proj", queries, inner, hidden),
    ]
    if layer.norms.place == "after":
        return [*works, moved("add_rms_norm_2", queries * 4 * hidden)]
    return [moved("rms_norm", rows * 2 * hidden), *works]


def product(op: str, rows: float, inputs: int, outputs: int) -> Work:
    """[rows, inputs] times a weight."""
    return Work(op, 2 * rows * inputs * outputs, SIZE * (rows * inputs + inputs * outputs + rows * outputs), "gemm")


def moved(op: str, numbers: float) -> Work:
    return Work(op, 0.0, SIZE * numbers, "")


def head_work(spec: ModelSpec, response_rows: float) -> list[Work]:
    """The final norm, and logits that are reduced where they are made."""
    hidden, vocabulary = spec.hidden_size, spec.vocab_size
    weights = SIZE * vocabulary * hidden
    flops = 2 * response_rows * hidden * vocabulary
    head = Work("option_logprobs", flops, weights + SIZE * response_rows * hidden, "gemm")
    return [moved("final_norm", response_rows * 2 * hidden), head]


@dataclass(frozen=True, slots=True)
class Mixture:
    """The MLP of a layer as a mixture of experts."""

    hidden: int
    inner: int
    num_experts: int
    top_k: int  # of a row

    def work(self, rows: float) -> list[Work]:
        """Rows spread evenly: an expert that one goes to reads its weights once."""
        slots = rows * self.top_k
        read = self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** rows)  # experts
        weight, slot_bytes = self.hidden * self.inner, SIZE * slots * (self.hidden + self.inner)
        gathered = SIZE * (rows * self.hidden + slots * self.inner)
        return [
            product("router", rows, self.hidden, self.num_experts),
            Work("expert_swiglu", 4 * slots * weight, gathered + SIZE * 2 * read * weight, "experts"),
            Work("expert_linear", 2 * slots * weight, slot_bytes + SIZE * read * weight, "experts"),
            moved("add_weighted", (slots + 2 * rows) * self.hidden),
        ]


MIXTURES = {"Qwen3-30B-A3B": Mixture(hidden=2048, inner=768, num_experts=128, top_k=8)}  # of which experts alone


@dataclass(frozen=True, slots=True)
class Roof:
    """A device with the assumptions."""

    device: Device
    assumed: Assumptions = Assumptions()

    def times(self, work: Work) -> tuple[float, float]:
        """Seconds of arithmetic, and of moving bytes."""
        compute = work.flops / (self.device.flops * getattr(self.assumed, work.unit)) if work.unit else 0.0
        return compute, work.bytes / (self.device.bandwidth * self.assumed.bandwidth)

    def seconds(self, work: Work) -> float:
        return max(self.times(work))

    def bound(self, work: Work) -> str:
        compute, memory = self.times(work)
        return "compute" if compute >= memory else "memory"


def roof_of(device: Device) -> Roof:
    return Roof(device, MEASURED.get(device.name, Assumptions()))


@dataclass(frozen=True, slots=True)
class Prediction:
    """A model on a device; times of a batch, and of the dataset."""

    layer: list[Work]  # of one batch, in a layer that attends without a window, if there is one
    last_layer: list[Work]  # of one batch
    head: list[Work]  # of as many response rows as a wave has
    hours_compute: float  # the dataset, were the weights always there
    hours_weights: float  # the link's own time for weights, if they are streamed; else 0
    is_streamed: bool

    def hours(self, idle: float) -> float:
        return max(self.hours_compute, self.hours_weights) / (1 - idle)


def predict(spec: ModelSpec, roof: Roof, data: Dataset, batch_rows: int, wave_rows: int) -> Prediction:
    response_share = data.response_rows / data.rows
    responses = batch_rows * response_share

    def work(layer: LayerSpec, queries: float) -> list[Work]:
        keys = data.visible_keys(layer.mixer.window)
        paths = max(batch_rows / (2 * data.visible_keys(None)), 1.0)
        return layer_work(layer, batch_rows, queries, queries * keys, paths, roof.device.l2)

    *body, final = spec.layers
    last = work(final, responses)
    kinds = {layer.mixer.window: work(layer, batch_rows) for layer in spec.layers}
    batch = sum(roof.seconds(w) for w in [moved("embed", 2 * batch_rows * spec.hidden_size), *last])
    batch += sum(roof.seconds(w) for layer in body for w in kinds[layer.mixer.window])
    head = head_work(spec, wave_rows * response_share)
    waves = data.rows / wave_rows
    compute = data.rows / batch_rows * batch + waves * sum(roof.seconds(w) for w in head)
    weights = num_weights(spec) * SIZE
    is_streamed = weights > roof.assumed.memory * roof.device.memory
    link = waves * weights / (roof.device.link * roof.assumed.link) if is_streamed else 0.0
    shown = kinds[None] if None in kinds else kinds[spec.layers[0].mixer.window]
    return Prediction(shown, last, head, compute / 3600, link / 3600, is_streamed)


def row_of(
    model: str, roof: Roof, scope: str, op: str, works: Sequence[Work], rows: float, bound: str = ""
) -> dict[str, object]:
    return {
        "device": roof.device.name,
        "model": model,
        "weights_gb": "" if model in MIXTURES else round(num_weights(model_spec(model)) * SIZE / 1e9, 1),
        "scope": scope,
        "op": op,
        "rows": round(rows),
        "gflop": round(sum(w.flops for w in works) / 1e9, 2),
        "megabytes": round(sum(w.bytes for w in works) / 1e6, 2),
        "microseconds": round(sum(roof.seconds(w) for w in works) * 1e6, 1),
        "bound": bound or roof.bound(max(works, key=roof.seconds)),
        "predicted_hours": "",
    }


def rows_of_mixture(model: str, roof: Roof, batch_rows: int) -> list[dict[str, object]]:
    works = MIXTURES[model].work(batch_rows)
    table = [row_of(model, roof, "op", work.op, [work], batch_rows) for work in works]
    return [*table, row_of(model, roof, "layer", "the experts of a layer, one batch", works, batch_rows)]


def rows_of(model: str, roof: Roof, batch_rows: int, wave_rows: int) -> list[dict[str, object]]:
    if model in MIXTURES:
        return rows_of_mixture(model, roof, batch_rows)
    found = predict(model_spec(model), roof, PSYCH_201, batch_rows, wave_rows)
    row = partial(row_of, model, roof)
    table = [row("op", work.op, [work], batch_rows) for work in found.layer]
    responses = wave_rows * PSYCH_201.response_rows / PSYCH_201.rows
    table += [row("op", work.op, [work], responses) for work in found.head]
    table.append(row("layer", "a layer, one batch", found.layer, batch_rows))
    table.append(row("layer", "the last layer, one batch", found.last_layer, batch_rows))
    is_waiting = found.hours_weights > found.hours_compute
    bound = "weights" if is_waiting else "compute, weights streamed" if found.is_streamed else "compute"
    hours = round(found.hours(roof.assumed.idle), 2)
    total = row("dataset", "Psych-201", found.layer, PSYCH_201.rows, bound)
    table.append(total | {"gflop": "", "megabytes": "", "microseconds": "", "predicted_hours": hours})
    return table


def write(path: Path, table: Sequence[Mapping[str, object]]) -> None:
    """Without date and machine: nothing was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*SHAPES, *MIXTURES], default=[*SHAPES, *MIXTURES])
    parser.add_argument("--batch-rows", type=int, default=16_384, help="as budgets.budgets on a device")
    parser.add_argument("--wave-rows", type=int, default=131_072, help="likewise")
    parser.add_argument("--name", help="CSV in results/; default: no file")
    options = parser.parse_args(arguments)
    table = [
        row
        for device in DEVICES
        for model in options.models
        for row in rows_of(model, roof_of(device), options.batch_rows, options.wave_rows)
    ]
    for row in table:
        if row["scope"] != "op" or len(options.models) == 1:
            print("  ".join(f"{k} {v}" for k, v in row.items() if v != ""))
    if options.name:
        write(RESULTS / f"{options.name}.csv", table)
        print(f"written: {RESULTS / options.name}.csv")


if __name__ == "__main__":
    main()
