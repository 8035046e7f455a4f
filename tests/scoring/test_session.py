"""Sessions in any order of events, against the whole text scored afresh and against transformers in fp64."""

from __future__ import annotations

import gzip
import json
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.asked import Reference, real_reference, toy_reference
from support.exactness import INVARIANCE, TOLERANCE
from support.toy import toy_rows

import psykern
from psykern.core.errors import NonFiniteError
from psykern.engine.page_tree import PAGE_TOKENS
from psykern.engine.pages import row_bytes
from psykern.scoring.loading import load
from psykern.scoring.results import Choice, Logprob
from psykern.scoring.scorer import Scorer
from psykern.scoring.session import Mark, Session, step

OPTIONS = [["J", "F"], ["1", "10", "100", "-7"], [" yes", "no", "h\u00e4user"], ["only"]]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return toy_reference(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return real_reference(shared, "llama-3.1", tmp_path_factory.mktemp("real") / "model")


def with_pages(reference: Reference, num_pages: int, **settings: Any) -> Scorer:
    model = reference.scorer.model
    size = num_pages * PAGE_TOKENS * row_bytes(model.spec, model.dtype)
    return load(reference.folder, device="cpu", session_bytes=size, **settings)


def assert_same_choice(got: Choice, expected: Choice) -> None:
    assert (got.options, got.flag) == (expected.options, expected.flag)
    np.testing.assert_allclose(got.log_softmax, expected.log_softmax, rtol=0, atol=2 * INVARIANCE)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, rtol=0, atol=2 * INVARIANCE)


def assert_same_logprob(got: Logprob, expected: Logprob) -> None:
    assert (got.num_tokens, got.flag) == (expected.num_tokens, expected.flag)
    assert got.logprob == pytest.approx(expected.logprob, rel=0, abs=INVARIANCE * expected.num_tokens**0.5)


class Loop:
    """Sessions to which anything happens, each with the text that it should have."""

    def __init__(self, scorer: Scorer, fresh: Scorer, seed: int, texts: Sequence[str]) -> None:
        self._rng = np.random.default_rng(seed)
        self._scorer, self._fresh, self._texts = scorer, fresh, texts
        self._sessions: list[tuple[Session, list[str]]] = [(scorer.session(), [""])]  # and the texts of its marks
        self._marks: dict[int, list[tuple[Mark, str]]] = {}

    def go(self, events: int) -> None:
        kinds = [
            self._append,
            self._append,
            self._choose,
            self._logprobs,
            self._fork,
            self._mark,
            self._reset,
            self._step,
        ]
        for _ in range(events):
            kinds[self._rng.integers(len(kinds))]()
            self._sessions = self._sessions[-8:]
            assert all(session.text == texts[0] for session, texts in self._sessions)

    def _one(self) -> tuple[Session, list[str]]:
        return self._sessions[self._rng.integers(len(self._sessions))]

    def _text(self) -> str:
        """A piece of a text, cut anywhere."""
        whole = self._texts[self._rng.integers(len(self._texts))]
        a, b = np.sort(self._rng.integers(len(whole) + 1, size=2))
        return whole[a : min(b, a + 120)]

    def _append(self) -> None:
        session, texts = self._one()
        text = self._text()
        session.append(text)
        texts[0] += text

    def _choose(self) -> None:
        session, texts = self._one()
        options = OPTIONS[self._rng.integers(len(OPTIONS))]
        assert_same_choice(session.choose(options, closing=">>"), self._fresh.choose(texts[0], options, closing=">>"))

    def _logprobs(self) -> None:
        session, texts = self._one()
        continuations = [self._text()[:20] or "x" for _ in range(self._rng.integers(1, 4))]
        got = session.logprobs(continuations)
        for of, expected in zip(got, self._fresh.logprobs(texts[0], continuations), strict=True):
            assert_same_logprob(of, expected)

    def _fork(self) -> None:
        session, texts = self._one()
        self._sessions.append((session.fork(), list(texts)))

    def _mark(self) -> None:
        session, texts = self._one()
        self._marks.setdefault(id(session), []).append((session.mark(), texts[0]))

    def _reset(self) -> None:
        session, texts = self._one()
        for mark, text in self._marks.pop(id(session), [])[-1:]:
            session.reset(mark)
            texts[0] = text

    def _step(self) -> None:
        sessions = [self._sessions[i] for i in self._rng.permutation(len(self._sessions))[:5]]
        new = [self._text() for _ in sessions]
        options = OPTIONS[self._rng.integers(len(OPTIONS))]
        choices = step([session for session, _ in sessions], new, options=options, closing=">>")
        assert choices is not None
        for (_, texts), text, choice in zip(sessions, new, choices, strict=True):
            texts[0] += text
            assert_same_choice(choice, self._fresh.choose(texts[0], options, closing=">>"))


@pytest.mark.parametrize("num_pages", [0, 2, 7, 500])
def test_whatever_happens_answers_are_those_of_the_whole_text(toy: Reference, num_pages: int) -> None:
    texts = [str(row["text"]) for row in toy_rows(count=3)]
    for seed, wave_tokens in enumerate((4096, 50)):
        Loop(with_pages(toy, num_pages, wave_tokens=wave_tokens), toy.scorer, seed, texts).go(60)


def test_real_tokens_too(real: Reference, shared: Path) -> None:
    """Pieces of real transcripts, cut in the middle of words and of white space, and of characters of several parts."""
    texts = ["\u4f60\u597d \U0001f469\u200d\U0001f680 e\u0301  \n\n x\u00a0\u2003y 1234567 don't \r\n"]
    for path in sorted((shared / "psych").glob("*.jsonl.gz"))[:4]:
        with gzip.open(path, "rt") as file:
            texts.append(json.loads(file.readline())["text"][:2000])
    assert len(texts) > 2
    Loop(with_pages(real, 12), real.scorer, 7, texts).go(80)


def test_a_session_equals_transformers(toy: Reference) -> None:
    session = toy.scorer.session("You choose between two slot machines labeled J and F.\n")
    for _ in range(4):
        session.append("Machine? You press <<")
        choice, (greedy,) = session.choose(["J", "F"]), session.logprobs(["J"], tokens=True)
        expected = [math.fsum(toy.continuation(session.text, option).logprobs) for option in ("J", "F")]
        np.testing.assert_allclose(choice.logprobs, expected, rtol=0, atol=2 * TOLERANCE)
        assert greedy.logprob == pytest.approx(expected[0], rel=0, abs=2 * TOLERANCE)
        assert greedy.tokens is not None
        assert greedy.tokens.ids.tolist() == toy.continuation(session.text, "J").ids
        session.append(f"{choice.option}>>. You win 17 points.\n")
    assert len(session) == session.num_tokens == len(toy.encode(session.text)[0])


def test_an_option_of_a_transcript_is_closed_as_in_a_record(toy: Reference, tmp_path: Path) -> None:
    text, options = "Rate each word.\nword 0: <<10>>\nword 1: <<1>>\n", ["1", "10", "100"]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text, "options": options}) + "\n")
    run = psykern.score(toy.folder, tmp_path / "rows.jsonl", tmp_path / "run", psykern.Settings(device="cpu"))
    record = psykern.read_run(run.folder).to_pylist()[1]
    session = toy.scorer.session(text[: text.rindex("1>>")])
    choice = session.choose(options)
    assert choice.flag is not None and "closing_mark" in choice.flag
    np.testing.assert_allclose(choice.log_softmax, record["option_log_softmax"], rtol=0, atol=4 * INVARIANCE)


def test_many_sessions_take_one_wave_a_step(toy: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = with_pages(toy, 500)
    waves: list[int] = []
    embed = scorer.model.embed
    monkeypatch.setattr(scorer.model, "embed", lambda ids: (waves.append(len(ids)), embed(ids))[1])
    start = scorer.session("You choose between two slot machines labeled J and F, 8 times in a row.\n")
    sessions = [start.fork() for _ in range(9)]
    assert step([start]) is None
    assert waves == [len(start)], "without options it computes"
    step(sessions, "Machine? You press <<", options=["J", "F"])
    assert len(waves) == 2 and waves[1] < 9 * 12, "what they begin with is there, and what is alike is computed once"
    step(sessions, [f"J>>. You win {i} points.\nMachine? You press <<" for i in range(9)], options=["J", "F"])
    assert len(waves) == 3
    assert step(sessions, options=["J", "F"]) is not None
    assert waves[3:] == [9], "of each the row that predicts"


def test_sessions_of_several_threads(toy: Reference) -> None:
    scorer, barrier = with_pages(toy, 12), threading.Barrier(4)
    texts = [str(row["text"]) for row in toy_rows(count=2)]

    def use(seed: int) -> None:
        barrier.wait()
        Loop(scorer, toy.scorer, seed, texts).go(25)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))


def test_marks_and_forks(toy: Reference) -> None:
    session = toy.scorer.session("one")
    first = session.mark()
    session.append(" two")
    fork, second = session.fork(), session.mark()
    session.reset(first)
    assert (session.text, fork.text) == ("one", "one two")
    with pytest.raises(ValueError, match="mark: the session was reset to a text before it"):
        session.reset(second)
    with pytest.raises(ValueError, match="mark: it is of another session; a fork needs marks of its own"):
        fork.reset(second)
    with pytest.raises(TypeError, match=r"mark: expected what Session\.mark gives, got str"):
        session.reset("one")  # type: ignore[arg-type]
    session.append(" three")
    session.reset(first)
    assert session.text == "one" and "3 tokens" not in repr(fork) and "'one two'" in repr(fork)


def test_a_failed_step_appends_nothing(toy: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = with_pages(toy, 50)
    sessions = [scorer.session("a"), scorer.session("b")]
    long = "word " * 5000
    with pytest.raises(ValueError, match=r"texts\[1\]: the session would have .* tokens, the model reads 4,096"):
        step(sessions, ["fine", long], options=["J", "F"])
    with pytest.raises(TypeError, match=r"texts\[1\]: expected a str, got None"):
        step(sessions, ["fine", None], options=["J", "F"])  # type: ignore[list-item]
    embed = scorer.model.embed
    monkeypatch.setattr(scorer.model, "embed", lambda ids: embed(ids) * math.nan)
    with pytest.raises(NonFiniteError):
        step(sessions, ["fine", "too"], options=["J", "F"])
    assert [session.text for session in sessions] == ["a", "b"]
    monkeypatch.undo()
    choices = step(sessions, ["fine", "too"], options=["J", "F"])
    assert choices is not None
    for session, choice in zip(sessions, choices, strict=True):
        assert_same_choice(choice, toy.scorer.choose(session.text, ["J", "F"]))
    assert [session.text for session in sessions] == ["afine", "btoo"]


def test_what_cannot_be_stepped_is_refused_by_name(toy: Reference) -> None:
    one, two = toy.scorer.session("a"), toy.scorer.session("b")
    other = replace(toy.scorer, name="other").session("a")
    cases: list[tuple[Any, Any, Any, type[Exception], str]] = [
        (one, None, ["J"], TypeError, "sessions: expected a list of Session, got one"),
        (7, None, ["J"], TypeError, "sessions: expected a list of Session, got 7"),
        ([one, "b"], None, ["J"], TypeError, r"sessions\[1\]: expected a Session, got str"),
        ([one, two, one], None, ["J"], ValueError, r"sessions\[2\]: it is the same session as sessions\[0\]"),
        ([one, other], None, ["J"], ValueError, r"sessions\[1\]: expected a session of the same Scorer"),
        ([one, two], ["x"], ["J"], ValueError, "texts: expected 2, one for each session, got 1"),
        ([one, two], 7, ["J"], TypeError, "texts: expected a str for all sessions, or a list of them, got 7"),
        ([one, two], None, [], ValueError, r"options"),
        ([one, two], None, [["J"]], ValueError, "options: expected 2"),
    ]
    for sessions, texts, options, error, message in cases:
        with pytest.raises(error, match=message):
            step(sessions, texts, options=options)
    assert step([], options=["J"]) == [] and step([]) is None


def test_what_a_session_cannot_take_is_refused_by_name(toy: Reference) -> None:
    session = toy.scorer.session("a")
    with pytest.raises(TypeError, match="text: expected a str, got b'x'"):
        session.append(b"x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"text: the session would have .* nothing is appended"):
        session.append("word " * 5000)
    with pytest.raises(ValueError, match="options: expected at least one option"):
        session.choose([])
    with pytest.raises(ValueError, match="continuations: expected at least one"):
        session.logprobs([])
    with pytest.raises(ValueError, match="boundary"):
        session.choose(["J"], boundary="none")  # type: ignore[arg-type]
    assert session.text == "a"
    with pytest.raises(ValueError, match="session_bytes: expected a number of bytes, at least 0, got -1"):
        load(toy.folder, device="cpu", session_bytes=-1)
