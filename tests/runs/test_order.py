"""Records come in the data's order, however units are cut; a run that was cut by another rule is not gone on with."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.toy import Toy, write_rows

import psykern
import psykern.data.feed
from psykern import Settings
from psykern.data.units import units
from psykern.study.finished import load, open_runs

SETTINGS = Settings(device="cpu", unit_tokens=30)
NAMES = ["study", "experiment", "participant", "response_index", "response"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Each participant has two transcripts, which begin otherwise; some cannot be used."""
    fronts = ["You see a red light. ", "There are two machines. ", "Zebras run. " * 8]
    rows: list[dict[str, Any]] = [
        {"study": "ab"[i % 5 == 0], "participant": i % 10, "text": f"{fronts[i % 3]}{i} You press <<{i}>>, <<B{i}>>."}
        for i in range(40)
    ]
    rows[7]["text"] = "<<"
    return write_rows(tmp_path / "rows.jsonl", rows)


def test_records_are_in_the_order_of_the_data(toy: Toy, data: Path, tmp_path: Path) -> None:
    whole = psykern.score(toy.model, data, tmp_path / "whole", replace(SETTINGS, unit_tokens=10**6))
    cut = psykern.score(toy.model, data, tmp_path / "cut", SETTINGS)
    assert (whole.units_total, cut.units_total > 10) == (2, True)
    table = psykern.read_run(tmp_path / "cut")
    assert table.select(NAMES).equals(psykern.read_run(tmp_path / "whole", NAMES))
    logprobs = [psykern.read_run(tmp_path / name)["logprob"].to_numpy() for name in ("cut", "whole")]
    assert np.abs(logprobs[0] - logprobs[1]).max() < 1e-4
    assert table.schema.metadata is None
    responses = [int(row["response"]) for row in table.to_pylist() if row["study"] == "a" and row["response"].isdigit()]
    assert responses == [i for i in range(40) if i % 5 and i != 7]


def test_comparing_sees_the_same_order(toy: Toy, data: Path, tmp_path: Path) -> None:
    """A participant's transcripts line up, whatever the size of units: records do not tell them apart."""
    found = []
    for size in (30, 10**6):
        psykern.score(toy.model, data, tmp_path / str(size), replace(SETTINGS, unit_tokens=size))
        (run,) = open_runs(tmp_path / str(size))
        found.append(load(run))
    assert found[0].participants == found[1].participants
    np.testing.assert_array_equal(found[0].texts, found[1].texts)
    np.testing.assert_allclose(found[0].logprob, found[1].logprob, atol=1e-4)


def test_a_part_that_is_missing_leaves_the_others_in_order(toy: Toy, data: Path, tmp_path: Path) -> None:
    psykern.score(toy.model, data, tmp_path / "run", SETTINGS)
    whole = psykern.read_run(tmp_path / "run", NAMES).to_pylist()
    sorted((tmp_path / "run" / "responses").iterdir())[2].unlink()
    rest = psykern.read_run(tmp_path / "run", NAMES).to_pylist()
    kept = {tuple(row.values()) for row in rest}
    assert 0 < len(rest) < len(whole)
    assert rest == [row for row in whole if tuple(row.values()) in kept]


def test_a_run_cut_along_the_file_is_refused(
    toy: Toy, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As versions of psykern before units followed the texts left it."""
    with monkeypatch.context() as before:
        before.setattr(psykern.data.feed, "units", partial(units, window_tokens=1))
        psykern.score(toy.model, data, tmp_path / "run", SETTINGS)
    with pytest.raises(psykern.RunFolderError, match=r"parts that are not of this run.*; take a new folder"):
        psykern.score(toy.model, data, tmp_path / "run", SETTINGS)
