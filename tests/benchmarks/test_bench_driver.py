"""benchmarks/bench_driver.py: on the package's own sample, and what it refuses."""

from __future__ import annotations

import csv
from pathlib import Path

import bench_driver
import numpy as np
import pytest
from instant import make_tiny

from psykern import Settings, demo


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_rates_of_the_driver_count_the_same_tokens_from_every_source(tmp_path: Path) -> None:
    options = ["--data", str(demo.SAMPLE), "--limit", "1", "--repeats", "1", "--folder", str(tmp_path), "--name"]
    bench_driver.main([*options, "d.csv"])
    found = rows(tmp_path / "d.csv")
    assert [row["source"] for row in found] == ["raw", "writing_cache", "warm_cache"]
    assert len({row["tokens"] for row in found}) == 1 and int(found[0]["tokens"]) > 1000
    assert [float(row["last_encode_s"]) > 0 for row in found] == [True, True, False]


def test_a_target_that_no_score_reaches_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny(tmp_path / "model")
    monkeypatch.setattr(bench_driver, "MADE_LOGPROB", np.nan)
    with pytest.raises(SystemExit, match="refused"):
        bench_driver.score_at_once(model, demo.SAMPLE, tmp_path / "run", Settings(limit=1))
