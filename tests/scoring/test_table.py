"""The table of records against a plain loop."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
from support.records import encoded, random_transcripts, target_scores

from psykern.core.types import EncodedTranscript, TargetScores
from psykern.scoring.table import SCHEMA, to_table


def records_by_loop(transcripts: list[EncodedTranscript], scores: TargetScores) -> list[dict[str, object]]:
    """The same records, one target at a time."""
    targets = iter(list(zip(scores.logprob.tolist(), scores.is_argmax.tolist(), scores.entropy.tolist(), strict=True)))
    rows = []
    for t in transcripts:
        for index, (start, end) in enumerate(t.spans_tok.tolist()):
            mine = [next(targets) for _ in range(start, end)]
            rows.append(
                {
                    "study": t.study,
                    "experiment": t.experiment,
                    "participant": t.participant,
                    "response_index": index,
                    "response": t.responses[index],
                    "num_tokens": len(mine),
                    "logprob": sum(m[0] for m in mine) if mine else None,
                    "is_argmax": all(m[1] for m in mine) if mine else None,
                    "entropy": mine[0][2] if mine else None,
                    "options": None if t.options[index] is None else list(t.options[index]),
                    "option_logprobs": None,
                    "option_log_softmax": None,
                    "option_index": None if t.option_index[index] < 0 else int(t.option_index[index]),
                    "flag": t.flags[index],
                }
            )
    first = 0
    for t in transcripts:
        scored = (np.diff(t.branch_offsets) - t.branch_scored_tok).tolist()
        for response, count in zip(t.branch_response.tolist(), scored, strict=True):
            row = rows[first + response]
            row["option_logprobs"] = [*(row["option_logprobs"] or []), sum(next(targets)[0] for _ in range(count))]
        first += len(t.responses)
    for row in rows:
        if row["option_logprobs"] is not None:
            logprobs = np.array(row["option_logprobs"])
            row["option_log_softmax"] = (logprobs - np.log(np.exp(logprobs).sum())).tolist()
    return rows


def test_record_of_two_tokens_and_two_options() -> None:
    transcript = encoded([2], [("A", "B")], [1], branch_tokens=[1, 3], branch_scored_tok=[0, 1])
    scores = target_scores([-0.25, -0.5, -1.0, -0.75, -0.25], [True, False, True, True, True])
    (row,) = to_table([transcript], scores).to_pylist()
    log_softmax = row.pop("option_log_softmax")
    assert log_softmax == pytest.approx([-np.log(2)] * 2, abs=1e-15)  # both options come to -1
    assert row == {
        "study": "study",
        "experiment": "study/exp1",
        "participant": "p1",
        "response_index": 0,
        "response": "r0",
        "num_tokens": 2,
        "logprob": -0.75,
        "is_argmax": False,
        "entropy": 0.5,
        "options": ["A", "B"],
        "option_logprobs": [-1.0, -1.0],
        "option_index": 1,
        "flag": None,
    }


@pytest.mark.parametrize("num_tokens", [[0], [0, 1], [1, 0], [1, 0, 0, 1], [0, 2, 0]], ids=str)
def test_empty_response_has_null_scores(num_tokens: list[int]) -> None:
    rows = to_table([encoded(num_tokens)], target_scores([-1.0] * sum(num_tokens))).to_pylist()
    assert [row["num_tokens"] for row in rows] == num_tokens
    assert [row["logprob"] for row in rows] == [-float(n) if n else None for n in num_tokens]
    assert [row["is_argmax"] for row in rows] == [True if n else None for n in num_tokens]
    assert [row["entropy"] is None for row in rows] == [n == 0 for n in num_tokens]
    assert [row["flag"] for row in rows] == ["empty" if n == 0 else None for n in num_tokens]


def test_transcripts_without_responses_have_no_rows() -> None:
    transcripts = [encoded([]), encoded([1, 1], participant="p2"), encoded([]), encoded([1], participant="p3")]
    table = to_table(transcripts, target_scores([-1.0, -2.0, -3.0]))
    assert table["participant"].to_pylist() == ["p2", "p2", "p3"]
    assert table["response_index"].to_pylist() == [0, 1, 0]
    assert table["logprob"].to_pylist() == [-1.0, -2.0, -3.0]


@pytest.mark.parametrize("transcripts", [[], [encoded([])]], ids=["no transcript", "no response"])
def test_nothing_is_an_empty_table(transcripts: list[EncodedTranscript]) -> None:
    table = to_table(transcripts, target_scores([]))
    assert table.schema == SCHEMA
    assert table.num_rows == 0


def test_option_log_softmax_is_stable_far_from_zero() -> None:
    transcript = encoded([1, 1], [("A", "B"), ("A",)], [0, 0])
    table = to_table([transcript], target_scores([-1.0, -1.0, -5000.0, -5001.0, -9000.0]))
    first, second = table["option_log_softmax"].to_pylist()
    assert first == pytest.approx([-np.log1p(np.exp(-1.0)), -1.0 - np.log1p(np.exp(-1.0))], abs=1e-12)
    assert second == [0.0]


def test_sum_is_float64() -> None:
    logprob = [-1000.0, *[-1e-5] * 100]  # each small one is lost in float32
    (row,) = to_table([encoded([101])], target_scores(logprob)).to_pylist()
    assert row["logprob"] == pytest.approx(-1000.001, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_random_transcripts_equal_a_plain_loop(seed: int) -> None:
    transcripts, scores = random_transcripts(np.random.default_rng(seed), 60)
    rows = to_table(transcripts, scores).to_pylist()
    expected = records_by_loop(transcripts, scores)
    assert any(row["logprob"] is None for row in expected) and any(row["options"] is None for row in expected)
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        for column in ("logprob", "option_logprobs", "option_log_softmax"):
            assert row.pop(column) == pytest.approx(other.pop(column), abs=1e-12)
        assert row == other


def test_real_responses_come_through_unchanged(shared: Path) -> None:
    with gzip.open(shared / "psych" / "guenther2023associations_individual.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"] for line in file]
    responses = [re.findall("<<(.*?)>>", text) for text in texts]
    transcripts = [encoded([1] * len(r), responses=r, participant=str(i)) for i, r in enumerate(responses)]
    total = sum(map(len, responses))
    table = to_table(transcripts, target_scores((-np.arange(float(total))).tolist()))
    assert total > 1000
    assert table["response"].to_pylist() == [r for of_transcript in responses for r in of_transcript]
    assert table["logprob"].to_pylist() == (-np.arange(float(total))).tolist()


@pytest.mark.parametrize("count", [2, 4], ids=["too few", "too many"])
def test_scores_of_other_transcripts_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"expected 3 targets.*got {count}"):
        to_table([encoded([3])], target_scores([-1.0] * count))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch_response": np.array([1, 0], np.int32)}, "study, p1: expected one branch per option"),
        ({"branch_scored_tok": np.array([0, 1], np.int32)}, "at least one scored token"),
        ({"option_index": np.array([-1, 1], np.int32)}, "option_index"),
    ],
    ids=["wrong order", "nothing scored", "no such option"],
)
def test_branches_that_do_not_fit_are_refused(changes: dict[str, np.ndarray], message: str) -> None:
    transcript = dataclasses.replace(encoded([1, 1], [("A",), ("B",)]), **changes)
    targets = 4 - int(transcript.branch_scored_tok.sum())
    with pytest.raises(ValueError, match=message):
        to_table([transcript], target_scores([-1.0] * targets))
