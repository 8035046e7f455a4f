"""Chat templates that print the day: a run's prompts hold one day, whenever and by whomever they are made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from support.scoring import score
from support.toy import TEMPLATE, Row, Toy, by_transcript

import psykern
from psykern import Run, Settings, Shard
from psykern.data.feed import Feed

DATED = "Today Date: {{ strftime_now('%d %b %Y') }}\n\n" + TEMPLATE
TODAY, TOMORROW = "2026-11-30", "2026-12-01"
CHAT = Settings(device="cpu", condition="chat", unit_tokens=1)  # a unit for each transcript

OnDay = Callable[[str], None]


@pytest.fixture
def on_day(monkeypatch: pytest.MonkeyPatch) -> OnDay:
    """Lets psykern and the templates of ``transformers`` see one second before the end of a day."""

    def at(day: str) -> None:
        moment = datetime.fromisoformat(day).replace(tzinfo=timezone.utc) + timedelta(days=1, seconds=-1)

        class Stopped(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return moment if tz else moment.replace(tzinfo=None)

        for module in ("psykern.core.clock", "psykern.runs.job", "transformers.utils.chat_template_utils"):
            monkeypatch.setattr(f"{module}.datetime", Stopped)

    return at


@pytest.fixture(scope="session")
def dated(talking: Toy, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The toy model with a template that prints the day."""
    folder = shutil.copytree(talking.model, tmp_path_factory.mktemp("dated") / "model")
    (folder / "chat_template.jinja").write_text(DATED)
    return replace(talking, model=folder)


@pytest.fixture(scope="session")
def by_day(talking: Toy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Row]]]:
    """The records under templates into which the day is written by hand."""
    records = {}
    for day, printed in ((TODAY, "30 Nov 2026"), (TOMORROW, "01 Dec 2026")):
        folder = shutil.copytree(talking.model, tmp_path_factory.mktemp(day) / "model")
        (folder / "chat_template.jinja").write_text(f"Today Date: {printed}\n\n{TEMPLATE}")
        records[day] = of(psykern.score(folder, talking.data, folder.parent / "run", CHAT))
    assert records[TODAY] != records[TOMORROW]
    return records


def of(run: Run) -> list[list[Row]]:
    return by_transcript(psykern.read_run(run.folder))


def manifest(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return loaded


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "responses").iterdir())


def stop_after_some(folder: Path) -> Callable[[], bool]:
    return lambda: len(list(folder.glob("responses/part-*"))) >= 3


def test_a_run_of_another_day_is_another_run(
    dated: Toy, by_day: dict[str, list[list[Row]]], on_day: OnDay, tmp_path: Path
) -> None:
    for day in (TODAY, TOMORROW):
        on_day(day)
        run = psykern.score(dated.model, dated.data, tmp_path / day, CHAT)
        assert of(run) == by_day[day]
        assert run.manifest.date == manifest(tmp_path / day)["date"] == day
    one, two = (manifest(tmp_path / day) for day in (TODAY, TOMORROW))
    assert one["chat_template_hash"] == two["chat_template_hash"]
    assert not set(parts(tmp_path / TODAY)) & set(parts(tmp_path / TOMORROW))


@pytest.mark.parametrize("protocol", ["exact", "study"])
def test_a_run_that_goes_on_next_day_keeps_its_day(dated: Toy, on_day: OnDay, tmp_path: Path, protocol: str) -> None:
    settings = replace(CHAT, protocol=protocol)
    on_day(TODAY)
    psykern.score(dated.model, dated.data, tmp_path / "quiet", settings)
    with pytest.raises(psykern.InterruptedRun):
        psykern.score(dated.model, dated.data, tmp_path / "run", settings, stop=stop_after_some(tmp_path / "run"))
    on_day(TOMORROW)
    for own in (settings, replace(settings, date=TODAY)):
        run = psykern.score(dated.model, dated.data, tmp_path / "run", own)
        assert run.manifest.date == manifest(tmp_path / "run")["date"] == TODAY
        assert parts(tmp_path / "run") == parts(tmp_path / "quiet")
        assert psykern.read_run(tmp_path / "run").equals(psykern.read_run(tmp_path / "quiet"))


def test_another_date_is_refused(dated: Toy, on_day: OnDay, tmp_path: Path) -> None:
    on_day(TODAY)
    with pytest.raises(psykern.InterruptedRun):
        psykern.score(dated.model, dated.data, tmp_path, CHAT, stop=stop_after_some(tmp_path))
    before = parts(tmp_path)
    with pytest.raises(
        psykern.RunFolderError, match=f'holds another run, which differs in date: "{TODAY}" there, "{TOMORROW}" here$'
    ):
        psykern.score(dated.model, dated.data, tmp_path, replace(CHAT, date=TOMORROW))
    assert parts(tmp_path) == before and manifest(tmp_path)["date"] == TODAY


def test_a_run_whose_day_nobody_knows_is_refused(dated: Toy, on_day: OnDay, tmp_path: Path) -> None:
    """One that an earlier psykern began, or whose manifest was changed."""
    on_day(TODAY)
    with pytest.raises(psykern.InterruptedRun):
        psykern.score(dated.model, dated.data, tmp_path, CHAT, stop=stop_after_some(tmp_path))
    began = manifest(tmp_path)
    for wrong, message in (
        ({}, 'date: null there, "2026-11-30" here'),
        ({"date": "today"}, "date: expected a day as YYYY-MM-DD, got 'today'"),
        ({"date": 20261130}, "date: expected a day as YYYY-MM-DD, got 20261130"),
    ):
        changed = {name: value for name, value in began.items() if name != "date"} | wrong
        (tmp_path / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(psykern.RunFolderError, match=message):
            psykern.score(dated.model, dated.data, tmp_path, CHAT)


def test_tokens_of_another_day_are_not_used(
    dated: Toy, by_day: dict[str, list[list[Row]]], on_day: OnDay, tmp_path: Path
) -> None:
    for day, phases in ((TODAY, True), (TOMORROW, True), (TODAY, False)):
        on_day(day)
        run = psykern.score(dated.model, dated.data, tmp_path / f"{day}-{phases}", CHAT, cache=tmp_path / "cache")
        assert of(run) == by_day[day]
        assert ("encode" in run.manifest.seconds) == phases


def test_a_run_that_goes_on_next_day_finds_its_tokens(
    dated: Toy, on_day: OnDay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of its own day; nothing is read or encoded again, and no cache of the next day is begun."""
    on_day(TODAY)
    psykern.score(dated.model, dated.data, tmp_path / "first", CHAT, cache=tmp_path / "cache")
    with pytest.raises(psykern.InterruptedRun):
        psykern.score(dated.model, dated.data, tmp_path / "run", CHAT, stop=stop_after_some(tmp_path / "run"))
    on_day(TOMORROW)
    monkeypatch.setattr(Feed, "_scan", lambda _: pytest.fail("the data were read"))
    run = psykern.score(dated.model, dated.data, tmp_path / "run", CHAT, cache=tmp_path / "cache")
    assert "encode" not in run.manifest.seconds
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_shards_that_begin_around_midnight_agree(dated: Toy, on_day: OnDay, tmp_path: Path) -> None:
    """Also where the second one's day has come to be when the first one's manifest is written."""
    on_day(TODAY)
    psykern.score(dated.model, dated.data, tmp_path / "quiet", CHAT)
    units = Feed.units
    others: list[Run] = []

    def late(feed: Feed) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Feed, "units", units)
            on_day(TODAY)
            others.append(psykern.score(dated.model, dated.data, tmp_path / "run", CHAT, shard=Shard(0, 2)))
            on_day(TOMORROW)
        return units(feed)

    on_day(TOMORROW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Feed, "units", late)
        run = psykern.score(
            dated.model, dated.data, tmp_path / "run", CHAT, shard=Shard(1, 2), cache=tmp_path / "cache"
        )
    assert [other.manifest.finished for other in others] == [None]
    assert run.units_done == run.units_total and run.manifest.date == TODAY
    assert parts(tmp_path / "run") == parts(tmp_path / "quiet")
    assert psykern.read_run(tmp_path / "run").equals(psykern.read_run(tmp_path / "quiet"))


def test_a_date_can_be_given(dated: Toy, by_day: dict[str, list[list[Row]]], on_day: OnDay, tmp_path: Path) -> None:
    on_day(TODAY)
    settings = replace(CHAT, date=TOMORROW)
    plain, chat = psykern.score_conditions(dated.model, dated.data, tmp_path, ["plain", "chat"], settings)
    assert of(chat) == by_day[TOMORROW]
    assert (plain.manifest.date, chat.manifest.date) == (None, TOMORROW)


def test_a_template_without_a_date_does_as_before(talking: Toy, on_day: OnDay, tmp_path: Path) -> None:
    on_day(TODAY)
    with pytest.raises(psykern.InterruptedRun):
        psykern.score(talking.model, talking.data, tmp_path, CHAT, stop=stop_after_some(tmp_path))
    assert manifest(tmp_path)["date"] is None
    on_day(TOMORROW)
    run = psykern.score(talking.model, talking.data, tmp_path, replace(CHAT, date=TOMORROW))
    score(talking.model, talking.data, tmp_path / "quiet", condition="chat", unit_tokens=1, date="1999-12-31")
    assert run.manifest.date is None and parts(tmp_path) == parts(tmp_path / "quiet")
    assert psykern.read_run(tmp_path).equals(psykern.read_run(tmp_path / "quiet"))


def test_a_plan_counts_the_tokens_of_the_date(dated: Toy, on_day: OnDay, tmp_path: Path) -> None:
    on_day(TODAY)
    for date in (None, "2026-05-01"):
        settings = replace(CHAT, date=date)
        planned = psykern.estimate(dated.model, dated.data, settings)
        run = psykern.score(dated.model, dated.data, tmp_path / str(date), settings)
        assert sum(study.tokens for study in planned.studies) == run.manifest.counts.tokens
