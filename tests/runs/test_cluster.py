"""A run on a local Ray cluster of two nodes equals, to the byte, that of one process, also when a worker is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.toy import TEMPLATE, Toy, make_toy_data, write_rows

import psykern
from psykern import Settings, Workers, score_on_cluster
from psykern.data.feed import Feed

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

SETTINGS = Settings(device="cpu", unit_tokens=1)  # a unit for each transcript


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Here and in the cluster's workers: on more, torch's matrix products may round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two nodes of one core each."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
    nodes.add_node(num_cpus=1, num_gpus=0)
    ray.init(address=nodes.address, log_to_driver=False)
    yield
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy_data(tmp_path_factory.mktemp("toy"), count=20)


@pytest.fixture(scope="module")
def expected(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("one")
    psykern.score(toy.model, toy.data, folder, SETTINGS)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def is_below(process: int, ancestor: int) -> bool:
    """Whether ``ancestor`` started ``process``, or what started it."""
    while process > 1 and process != ancestor:
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return process == ancestor


def kill_a_worker_that_scores(out: Path, killed: list[int]) -> None:
    """Waits for the first part, then kills one of the actors, of this process's cluster: others may test beside it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any((out / "responses").glob("part-*.parquet")):
        time.sleep(0.005)
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may be gone by now
            if b"ray::_Worker" in (process / "cmdline").read_bytes() and is_below(int(process.name), os.getpid()):
                assert json.loads((out / "manifest.json").read_text())["finished"] is None  # in the middle
                os.kill(int(process.name), signal.SIGKILL)
                killed.append(int(process.name))
                return


def test_a_killed_worker_changes_nothing(cluster: None, toy: Toy, expected: dict[str, bytes], tmp_path: Path) -> None:
    out, killed = tmp_path / "run", list[int]()
    killer = threading.Thread(target=kill_a_worker_that_scores, args=(out, killed))
    killer.start()
    run = score_on_cluster(toy.model, toy.data, out, SETTINGS, workers=Workers(cpus=1))
    killer.join()
    assert len(killed) == 1
    assert run.units_done == run.units_total == len(toy.rows)
    assert contents(out) == expected
    assert run.manifest.finished is not None


def test_an_error_of_a_worker_is_the_callers(cluster: None, toy: Toy, tmp_path: Path) -> None:
    """And what can be known before a worker starts is said before."""
    with pytest.raises(psykern.CheckpointError, match="no such model folder"):
        score_on_cluster(tmp_path / "nowhere", toy.data, tmp_path / "run", SETTINGS)
    with pytest.raises(psykern.BackendError, match="expected 1 to 2 workers, as the cluster has 0 GPUs and 2 cores"):
        score_on_cluster(toy.model, toy.data, tmp_path / "run", SETTINGS, workers=Workers(count=3, cpus=1))
    config = toy.model / "config.json"
    short = tmp_path / "short"
    short.mkdir()
    for path in toy.model.iterdir():
        (short / path.name).symlink_to(path)
    (short / "config.json").unlink()
    values = json.loads(config.read_text()) | {"max_position_embeddings": 16}
    (short / "config.json").write_text(json.dumps(values))
    with pytest.raises(psykern.PsykernError, match=r"needs .* tokens of context, the model has 16"):
        score_on_cluster(short, toy.data, tmp_path / "run", SETTINGS, workers=Workers(cpus=1))


def test_a_stopped_run_goes_on(cluster: None, toy: Toy, expected: dict[str, bytes], tmp_path: Path) -> None:
    """By one process, from where the cluster left it."""
    out = tmp_path / "run"
    with pytest.raises(psykern.InterruptedRun, match=r"of 60 units are done"):
        score_on_cluster(
            toy.model,
            toy.data,
            out,
            SETTINGS,
            workers=Workers(cpus=1),
            stop=lambda: any((out / "responses").glob("part-*.parquet")),
        )
    kept = contents(out)
    assert 0 < len(kept) < 60
    assert kept.items() <= expected.items()
    psykern.score(toy.model, toy.data, out, SETTINGS)
    assert contents(out) == expected


def test_people_are_those_of_one_process(cluster: None, toy: Toy, tmp_path: Path) -> None:
    """1 and 2 are in both files, the former with a row that repeats one; 2 rows of the first name nobody."""
    rows = [{"text": row["text"]} for row in (*toy.rows[:8], toy.rows[0])]
    ids = [1, None, 2, None, 3], ["2", 4, 5, 1.0]
    for name, own, of in zip(("train-0", "train-1"), ids, (rows[:5], rows[5:]), strict=True):
        write_rows(tmp_path / "s" / f"{name}.jsonl", [r | {"participant": i} for r, i in zip(of, own, strict=True)])
    settings = replace(SETTINGS, same_participants="separate")
    alone = psykern.score(toy.model, tmp_path / "s", tmp_path / "alone", settings)
    run = score_on_cluster(toy.model, tmp_path / "s", tmp_path / "run", settings, workers=Workers(cpus=1))
    assert contents(tmp_path / "run") == contents(tmp_path / "alone")
    counts = run.manifest.counts
    assert counts == alone.manifest.counts
    assert (counts.without_id_transcripts, counts.shared_participants, counts.repeated_transcripts) == (2, 2, 1)


@pytest.mark.parametrize("begun", ["before", "meanwhile"])
def test_workers_take_the_date_of_the_run_that_is_there(
    cluster: None, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: str
) -> None:
    """Also where another process began it, on another day, since they have asked for it."""
    folder = shutil.copytree(toy.model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }} " + TEMPLATE)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    chat, out = replace(SETTINGS, condition="chat", limit=2), tmp_path / "run"
    past, units = replace(chat, date="2001-02-03"), Feed.units
    psykern.score(folder, toy.data, tmp_path / "quiet", past)

    def begin(feed: Feed | None) -> Any:
        monkeypatch.setattr(Feed, "units", units)
        with pytest.raises(psykern.InterruptedRun):
            psykern.score(folder, toy.data, out, past, stop=lambda: any(out.glob("responses/part-*")))
        return units(feed) if feed else None

    if begun == "before":
        begin(None)
    else:
        monkeypatch.setattr(Feed, "units", begin)
    run = score_on_cluster(folder, toy.data, out, chat, workers=Workers(cpus=1))
    assert run.manifest.date == "2001-02-03" and run.manifest.finished is not None
    assert contents(out) == contents(tmp_path / "quiet")
