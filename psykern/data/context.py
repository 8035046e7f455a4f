"""Transcripts longer than the model's context: the over-length policy.

The token at index p is predicted from the p tokens before it, so a response fits where its last token, and the last
token of each of its options, has no more than the context's tokens before it. A transcript is cut between responses.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from psykern.core.errors import PsykernError
from psykern.core.settings import OverLength
from psykern.core.types import EncodedTranscript


def fit(encoded: EncodedTranscript, over_length: OverLength, max_positions: int | None) -> EncodedTranscript | None:
    """The transcript under the over-length policy, for a context of ``max_positions`` tokens. None: skipped.

    Raises PsykernError where it is too long and the policy is "error".
    """
    needed = _positions_needed(encoded)
    if max_positions is None or needed.max(initial=0) <= max_positions:
        return encoded
    if over_length == "error":
        raise PsykernError(
            f"{encoded.source}: {encoded.study}, participant {encoded.participant}: "
            f"needs {needed.max()} tokens of context, the model has {max_positions}; "
            'over-length policies: "error" stops, "skip" leaves such transcripts out, '
            '"truncate" keeps the responses that fit'
        )
    return None if over_length == "skip" else cut(encoded, int(np.argmax(needed > max_positions)))


def _positions_needed(encoded: EncodedTranscript) -> np.ndarray:
    """[R] int64, tokens of context that a response and its options need: the token at index p is predicted from the
    p before it."""
    first, stop = encoded.spans_tok.astype(np.int64).T
    needed = np.where(first < stop, stop - 1, 0)
    np.maximum.at(needed, encoded.branch_response, encoded.branch_parent_tok + np.diff(encoded.branch_offsets) - 1)
    return needed


def cut(encoded: EncodedTranscript, count: int) -> EncodedTranscript:
    """The first ``count`` responses, with the tokens that they and their branches need."""
    branches = int(np.searchsorted(encoded.branch_response, count))
    first, stop = encoded.spans_tok[:count].T
    # A branch of an empty last response can begin behind the last scored token.
    num_tokens = max(stop[first < stop].max(initial=0), encoded.branch_parent_tok[:branches].max(initial=0))
    return replace(
        encoded,
        token_ids=encoded.token_ids[:num_tokens].copy(),
        responses=encoded.responses[:count],
        spans_tok=np.minimum(encoded.spans_tok[:count], num_tokens),
        flags=encoded.flags[:count],
        options=encoded.options[:count],
        option_index=encoded.option_index[:count],
        branch_response=encoded.branch_response[:branches],
        branch_parent_tok=encoded.branch_parent_tok[:branches],
        branch_scored_tok=encoded.branch_scored_tok[:branches],
        branch_offsets=encoded.branch_offsets[: branches + 1],
        branch_token_ids=encoded.branch_token_ids[: encoded.branch_offsets[branches]],
        num_dropped=len(encoded.responses) - count,
    )
