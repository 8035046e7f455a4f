"""Runs that are stopped, split and disturbed: every record is there in the end, to the byte, as in a quiet run."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.toy import Toy, make_toy_data, write_rows

import psykern
from psykern import Settings, Shard, _cpu

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Settings(device="cpu", unit_tokens=1)  # a unit for each transcript


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    made = make_toy_data(tmp_path_factory.mktemp("toy"))
    with made.data.open("a") as file:
        file.write('{"text": "<<refused"}\n')
    return made


@pytest.fixture(scope="module")
def expected(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a quiet run leaves."""
    folder = tmp_path_factory.mktemp("quiet")
    run = psykern.score(toy.model, toy.data, folder, SETTINGS)
    assert (run.units_done, run.manifest.counts.rejects) == (len(toy.rows), 1)
    return contents(folder)


def contents(run: Path) -> dict[str, bytes]:
    files = (path for path in run.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def manifest(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return loaded


# Going on


def test_a_finished_run_computes_nothing_again(
    toy: Toy, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = psykern.score(toy.model, toy.data, tmp_path, SETTINGS)
    monkeypatch.setattr("psykern.engine.engine.run_wave", lambda *_: pytest.fail("something was computed"))
    again = psykern.score(toy.model, toy.data, tmp_path, SETTINGS)
    assert contents(tmp_path) == expected
    assert (again.summary, again.manifest.counts) == (first.summary, first.manifest.counts)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_missing_is_computed(seed: int, toy: Toy, expected: dict[str, bytes], tmp_path: Path) -> None:
    psykern.score(toy.model, toy.data, tmp_path, SETTINGS)
    parts = sorted((tmp_path / "responses").iterdir())
    rng = random.Random(seed)
    for part in rng.sample(parts, 5):
        part.unlink()
    damaged = rng.choice(sorted((tmp_path / "responses").iterdir()))
    damaged.write_bytes(damaged.read_bytes()[: rng.randrange(200)])
    psykern.score(toy.model, toy.data, tmp_path, SETTINGS)
    assert contents(tmp_path) == expected


def test_a_stop_keeps_the_units_that_were_begun(toy: Toy, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Stopped after every two units or so, and gone on with, until it is done."""
    stops = 0
    while True:
        before = len(list(tmp_path.glob("responses/part-*")))
        try:
            psykern.score(
                toy.model,
                toy.data,
                tmp_path,
                SETTINGS,
                stop=lambda seen=before: len(list(tmp_path.glob("responses/part-*"))) >= seen + 2,
            )
            break
        except psykern.InterruptedRun as error:
            stops += 1
            done = len(list(tmp_path.glob("responses/part-*")))
            assert before < done < len(toy.rows)
            assert f"{done} of {len(toy.rows)} units are done, and the same command goes on" in str(error)
            assert manifest(tmp_path)["finished"] is None
    assert stops >= 2
    assert contents(tmp_path) == expected


def test_a_unit_that_was_begun_is_left_undone(toy: Toy, tmp_path: Path) -> None:
    """``stop`` is asked between the waves of one unit, too."""
    settings = replace(SETTINGS, unit_tokens=100_000, wave_tokens=64, batch_tokens=64)
    psykern.score(toy.model, toy.data, tmp_path / "quiet", settings)
    asked: list[None] = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) > 2

    with pytest.raises(psykern.InterruptedRun, match=r"0 of 3 units are done, and the same command goes on"):
        psykern.score(toy.model, toy.data, tmp_path / "run", settings, stop=stop)
    assert len(asked) < 6 and list((tmp_path / "run").glob("responses/*")) == []
    psykern.score(toy.model, toy.data, tmp_path / "run", settings)
    assert contents(tmp_path / "run") == contents(tmp_path / "quiet")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_run_keeps_the_budgets_that_it_began_with_where_scores_depend_on_them(
    backend: psykern.kernels.Backend, toy: Toy, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, backend=backend)
    with pytest.raises(psykern.InterruptedRun):
        psykern.score(toy.model, toy.data, tmp_path, replace(settings, wave_tokens=64), stop=lambda: True)
    run = psykern.score(toy.model, toy.data, tmp_path, settings)
    assert run.manifest.company_free is (backend == "cpu")
    assert (run.manifest.wave_tokens == 64) is (backend == "reference")


def test_a_run_that_goes_on_elsewhere_names_the_arithmetic_of_both(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cpu, "instruction_set", lambda: "one set")
    with pytest.raises(psykern.InterruptedRun):
        psykern.score(toy.model, toy.data, tmp_path, SETTINGS, stop=lambda: True)
    monkeypatch.setattr(_cpu, "instruction_set", lambda: "another")
    for _ in range(2):
        run = psykern.score(toy.model, toy.data, tmp_path, SETTINGS)
        assert run.manifest.arithmetic == "fp32 products (one set), fp32 sums; fp32 products (another), fp32 sums"


def test_a_run_may_go_on_with_other_budgets_to_the_same_bytes(toy: Toy, tmp_path: Path) -> None:
    """On a CPU, of which each process may choose what suits it."""
    done = psykern.score(toy.model, toy.data, tmp_path / "whole", SETTINGS)
    asked: list[None] = []
    with pytest.raises(psykern.InterruptedRun):
        psykern.score(
            toy.model,
            toy.data,
            tmp_path / "parts",
            replace(SETTINGS, wave_tokens=50, batch_tokens=11),
            stop=lambda: asked.append(None) or len(asked) > 8,
        )
    parts = psykern.score(toy.model, toy.data, tmp_path / "parts", replace(SETTINGS, batch_tokens=300))
    assert psykern.read_run(parts.folder).equals(psykern.read_run(done.folder))


@pytest.mark.parametrize("change", [{"protocol": "study"}, {"discrete": "[A-Z]"}, {"unit_tokens": 2}, {"limit": 3}])
def test_another_run_is_refused(change: dict[str, Any], toy: Toy, tmp_path: Path) -> None:
    psykern.score(toy.model, toy.data, tmp_path, SETTINGS)
    before = contents(tmp_path)
    with pytest.raises(psykern.RunFolderError, match=f"holds another run, which differs in {next(iter(change))}: "):
        psykern.score(toy.model, toy.data, tmp_path, replace(SETTINGS, **change))
    assert contents(tmp_path) == before


def test_parts_that_are_not_of_the_run_are_not_counted_beside_it(toy: Toy, tmp_path: Path) -> None:
    """Another version of psykern can have cut or hashed the rows otherwise; both parts' rows would be read."""
    run = psykern.score(toy.model, toy.data, tmp_path, SETTINGS)
    part = sorted((tmp_path / "responses").iterdir())[1]
    other = part.with_name(part.name[:-12] + "0123456.parquet")
    part.rename(other)
    with pytest.raises(
        psykern.RunFolderError, match=f"parts that are not of this run.*{other.name}; take a new folder"
    ):
        psykern.score(toy.model, toy.data, tmp_path, SETTINGS)
    other.unlink()
    assert psykern.score(toy.model, toy.data, tmp_path, SETTINGS).manifest.counts == run.manifest.counts


def test_the_cache_changes_nothing(toy: Toy, expected: dict[str, bytes], tmp_path: Path) -> None:
    for name in ("cold", "warm"):
        run = psykern.score(toy.model, toy.data, tmp_path / name, SETTINGS, cache=tmp_path / "cache")
        assert contents(tmp_path / name) == expected
    assert "encode" not in run.manifest.seconds


def test_a_run_can_go_to_a_url(toy: Toy, expected: dict[str, bytes]) -> None:
    import fsspec

    url = f"memory://{uuid.uuid4().hex}/run"
    with pytest.raises(psykern.InterruptedRun):
        psykern.score(toy.model, toy.data, url, SETTINGS, stop=lambda: True)
    run = psykern.score(toy.model, toy.data, url, SETTINGS)
    assert run.folder == url
    fs, root = fsspec.core.url_to_fs(url)
    found = {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}
    assert json.loads(found.pop("manifest.json"))["finished"] is not None
    assert found == expected
    assert psykern.read_run(url).num_rows == run.manifest.counts.responses


# Shards


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[::2], ids=str)
def test_shards_in_any_order_make_one_run(
    order: Sequence[int], toy: Toy, expected: dict[str, bytes], tmp_path: Path
) -> None:
    for last, index in enumerate(order, start=1):
        run = psykern.score(toy.model, toy.data, tmp_path, SETTINGS, shard=Shard(index, 3))
        assert (run.manifest.finished is None) == (last < 3)
        assert (tmp_path / "summary.json").exists() == (last == 3)
    assert run.units_done == run.units_total
    assert contents(tmp_path) == expected


def test_shards_can_run_at_the_same_time(toy: Toy, expected: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shards = [start(toy, out, "--shard", f"{i}/2") for i in range(2)]
    for shard in shards:
        _, err = shard.communicate(timeout=120)
        assert shard.returncode in (0, 3), err  # 3: a row was refused
    assert contents(out) == expected
    assert manifest(out)["finished"] is not None


@pytest.mark.parametrize("text", ["3/3", "-1/3", "1", "a/b", "1/0", ""])
def test_a_shard_that_is_none_is_wrong_usage(text: str, toy: Toy, tmp_path: Path) -> None:
    from psykern.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["score", str(toy.model), str(toy.data), "--out", str(tmp_path / "run"), f"--shard={text}"])
    assert stopped.value.code == 2
    assert not (tmp_path / "run").exists()


# Signals


def start(toy: Toy, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "psykern", "score", toy.model, toy.data, "--out", out, "--device", "cpu"]
    return subprocess.Popen(
        [*map(str, command), "--unit-tokens", "1", "--quiet", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_a_part(out: Path, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not any(out.glob("responses/part-*")):
        time.sleep(0.001)


@pytest.fixture(scope="module")
def long_toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Enough units that a signal comes before the last."""
    return make_toy_data(tmp_path_factory.mktemp("long"), count=150)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"])
def test_a_signal_finishes_the_wave_in_hand(number: int, status: int, long_toy: Toy, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(long_toy, out)
    wait_for_a_part(out, process)
    process.send_signal(number)
    stdout, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert stdout == "" and "Traceback" not in err
    assert f"{signal.Signals(number).name}: finishing the wave in hand; once more stops at once" in err
    done = len(list(out.glob("responses/part-*")))
    assert f"stopped as asked; {done} of 450 units are done, and the same command goes on" in err
    assert 0 < done < 450
    assert not list(out.glob("responses/.*"))
    assert psykern.read_run(out).num_rows > 0
    assert manifest(out)["finished"] is None


def test_a_second_signal_stops_at_once(toy: Toy, tmp_path: Path) -> None:
    """While the wave in hand would take for ever."""
    script = (
        "import sys, time, psykern.engine.engine\n"
        "from psykern.cli import main\n"
        "psykern.engine.engine.run_wave = lambda *_: print('computing', flush=True) or time.sleep(600)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, "score", toy.model, toy.data, "--out", tmp_path / "run", "--quiet"]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "computing\n"
    process.send_signal(signal.SIGTERM)
    line = ""
    while "once more stops at once" not in line:
        line = process.stderr.readline()
        assert line
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "SIGINT again: stopped; records written so far are kept" in err


# Input that breaks


def test_a_file_that_ends_in_the_middle_costs_no_row_before(toy: Toy, tmp_path: Path) -> None:
    rows = [dict(row, study="s", filler=os.urandom(40).hex()) for row in toy.rows]
    whole = write_rows(tmp_path / "whole.jsonl", rows).read_bytes()
    data = tmp_path / "data" / "s.jsonl.gz"
    data.parent.mkdir()
    data.write_bytes(gzip.compress(whole)[:-400])
    write_rows(tmp_path / "data" / "t.jsonl", toy.rows[:2])
    run = psykern.score(toy.model, data.parent, tmp_path / "run", SETTINGS)
    counts = run.manifest.counts
    (reject,) = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert reject["file"] == str(data) and "damaged or truncated after line" in reject["reason"]
    assert counts.transcripts == reject["line"] - 1 + 2
    assert 2 < counts.transcripts < len(rows) + 2


def test_hostile_names_write_nothing_outside(toy: Toy, tmp_path: Path) -> None:
    names = ["../../escape", "/tmp/psykern-escape", "a/b", "..", "nul\\u0000", "line\\nbreak", "-rf", "con"]
    rows = [dict(toy.rows[0], study=name, experiment=name, participant=name) for name in names]
    inner = tmp_path / "inner"
    data = write_rows(inner / "rows.jsonl", rows)
    before = {path for path in tmp_path.rglob("*")}
    run = psykern.score(toy.model, data, inner / "run", SETTINGS, cache=inner / "cache")
    assert run.manifest.counts.transcripts == len(names)
    new = {path for path in tmp_path.rglob("*")} - before
    assert all(path.is_relative_to(inner / "run") or path.is_relative_to(inner / "cache") for path in new)
    assert not Path("/tmp/psykern-escape").exists()
    assert {path.name for path in (inner / "run").iterdir()} == {"manifest.json", "responses", "summary.json"}
    assert all(path.name.startswith("part-0000") for path in (inner / "run" / "responses").iterdir())
    assert sorted(psykern.read_run(inner / "run")["study"].unique().to_pylist()) == sorted(names)
