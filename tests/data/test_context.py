"""The over-length policy: what fits, what it says, and where a transcript is cut."""

from __future__ import annotations

from typing import Any

import pytest
from support.studies import RealTokenizers, StudyRows
from support.tiny import branches, encode, transcript, words

from psykern.core.errors import PsykernError
from psykern.core.settings import OverLength
from psykern.core.types import EncodedTranscript, Transcript
from psykern.data.context import fit
from psykern.data.tokenizer import Tokenizer

LONG = "x <<a>> <<b>> <<ab>> <<a>>"  # x | <<|a|>>| <<|b|>>| <<|ab|>>| <<|a|>>: responses at 2, 5, 8, 11


def fitted(
    tokenizer: Tokenizer, of: Transcript, max_positions: int, over_length: OverLength = "error", **settings: Any
) -> EncodedTranscript:
    """The transcript as tokens, cut to a context."""
    fitting = fit(encode(tokenizer, of, **settings), over_length, max_positions)
    assert fitting is not None
    return fitting


def test_tokens_behind_the_last_response_are_left_out(tiny: Tokenizer) -> None:
    encoded = fitted(tiny, transcript(LONG + " and more text"), 11)
    assert words(tiny, encoded.token_ids[-3:]) == [">>", " <<", "a"] and len(encoded.token_ids) == 12
    assert encoded.num_dropped == 0


@pytest.mark.parametrize("settings", [{}, {"options": "observed"}, {"boundary": "split"}, {"protocol": "study"}])
def test_a_transcript_without_responses_has_no_tokens(tiny_bos: Tokenizer, settings: dict[str, Any]) -> None:
    encoded = fitted(tiny_bos, transcript("nothing here"), 1, **settings)
    assert len(encoded.token_ids) == 0 and encoded.spans_tok.shape == (0, 2) and encoded.responses == ()
    assert encoded.branch_offsets.tolist() == [0]


def test_over_length_is_an_error_that_says_what_to_do(tiny: Tokenizer) -> None:
    with pytest.raises(PsykernError) as caught:
        fitted(tiny, transcript(LONG, line=3), 10)
    message = str(caught.value)
    for part in ("file.jsonl:3", "study, participant 1", "needs 11 tokens", "has 10", "error", "skip", "truncate"):
        assert part in message


def test_over_length_counts_what_branches_need(tiny: Tokenizer) -> None:
    row = transcript(LONG, (("a",),) * 3 + (("a", "bcd"),))
    assert len(fitted(tiny, row, 13).token_ids) == 12
    with pytest.raises(PsykernError, match="needs 13 tokens"):
        fitted(tiny, row, 12)


def test_over_length_skips(tiny: Tokenizer) -> None:
    rows = [transcript(LONG), transcript("x <<a>>"), transcript(LONG)]
    fitting = [fit(encode(tiny, row), "skip", 10) for row in rows]
    assert [one and (one.responses, one.num_dropped) for one in fitting] == [None, (("a",), 0), None]


def test_over_length_truncates_at_a_response(tiny: Tokenizer) -> None:
    row = transcript(LONG, ("a", "b"))
    full = encode(tiny, row)
    for limit, count in ((11, 4), (10, 3), (8, 3), (7, 2), (2, 1), (1, 0)):
        encoded = fitted(tiny, row, limit, "truncate")
        assert (
            len(encoded.responses) == count == len(encoded.flags) == len(encoded.options) == len(encoded.option_index)
        )
        assert encoded.num_dropped == 4 - count
        assert encoded.spans_tok.tolist() == full.spans_tok[:count].tolist()
        assert encoded.token_ids.tolist() == full.token_ids[: encoded.spans_tok.max(initial=0)].tolist()
        assert list(branches(encoded)) == list(branches(full))[: 2 * count]


def test_real_truncation(real: RealTokenizers, study_rows: StudyRows) -> None:
    row = study_rows("dezfouli2019", 1)[0]
    encoded = fitted(real("qwen3"), row, 4096, "truncate", options="observed")
    assert 4096 - 40 < len(encoded.token_ids) <= 4097
    assert len(encoded.responses) + encoded.num_dropped == len(row.responses_char)
