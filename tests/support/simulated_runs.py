"""Simulated runs in the records' format, for tests of what reads finished runs: no model, planted numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from psykern.scoring.table import SCHEMA

MANIFEST: dict[str, Any] = {
    "model_hash": "0" * 64,
    "data": [{"path": "data.jsonl", "hash": "d" * 64, "bytes": 1}],
    "protocol": "exact",
    "boundary": "joint",
    "options": "given",
    "max_options": 26,
    "over_length": "error",
    "limit": None,
    "studies": None,
    "device": "cpu",
    "dtype": "float32",
    "versions": {"psykern": "0"},
    "finished": "2026-01-01T00:00:00+00:00",
}
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Humans:
    """Who answered what: studies with participants who have responses, with options or without."""

    studies: Sequence[str] = ("alpha", "beta", "gamma")
    participants: int = 12
    responses: int = 20
    options: int = 3  # of every study but the last; 0: none anywhere
    seed: int = 0


def rows(humans: Humans, *, shift: float = 0.0, sharpness: float = 1.0, seed: int = 1) -> list[Row]:
    """Records of a model. ``shift`` nats are added to every NLL; ``sharpness`` multiplies the log-odds of the options.

    What people chose, how hard it is and the options' log-odds depend on ``humans`` alone, and ``seed`` adds noise.
    """
    known, noise = np.random.default_rng(humans.seed), np.random.default_rng(seed)
    found = []
    for number, study in enumerate(humans.studies):
        has_options = humans.options > 0 and (number < len(humans.studies) - 1 or len(humans.studies) == 1)
        for participant in range(humans.participants):
            ease = known.normal()
            for index in range(int(known.integers(2, humans.responses + 1))):
                odds = known.normal(size=max(humans.options, 2)) * 1.2 + ease * 0.2
                choice = int(known.choice(len(odds), p=np.exp(odds) / np.exp(odds).sum()))
                nll = math.exp(0.4 * ease + 0.5 * known.normal() + 0.2 * number) + 0.05 * noise.normal() + shift
                row: Row = dict.fromkeys(SCHEMA.names) | {
                    "study": study,
                    "experiment": f"{study}-{participant % 2}",
                    "participant": str(participant),
                    "response_index": index,
                    "response": "ABCDEFGH"[choice],
                    "num_tokens": 1,
                    "logprob": -max(nll, 1e-3),
                    "is_argmax": bool(known.random() < 0.4 - 0.2 * shift),
                    "entropy": 2.0 / sharpness,
                }
                if has_options:
                    scaled = odds * sharpness
                    log_softmax = scaled - np.logaddexp.reduce(scaled)
                    row["options"] = list("ABCDEFGH"[: len(odds)])
                    row["option_logprobs"] = row["option_log_softmax"] = log_softmax.tolist()
                    row["option_index"] = choice
                found.append(row)
    return found


def write_run(folder: Path, model_id: str, records: Sequence[Row], *, parts: int = 2, **manifest: Any) -> Path:
    """A finished run's folder; ``records`` are cut into ``parts``."""
    (folder / "responses").mkdir(parents=True)
    for number, part in enumerate(np.array_split(np.arange(len(records)), parts)):
        table = pa.Table.from_pylist([records[i] for i in part], schema=SCHEMA)
        pq.write_table(table, folder / "responses" / f"part-{number:05d}.parquet")
    (folder / "manifest.json").write_text(json.dumps(MANIFEST | {"model_id": model_id} | manifest))
    return folder
