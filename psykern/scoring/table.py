"""Scores of tokens to a table of records: one row per response."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import pyarrow as pa

from psykern.core import csr
from psykern.core.types import EncodedTranscript, TargetScores

SCHEMA = pa.schema(
    [
        ("study", pa.string()),
        ("experiment", pa.string()),
        ("participant", pa.string()),
        ("response_index", pa.int32()),  # within the transcript, from 0
        ("response", pa.string()),  # the text between the marks
        ("num_tokens", pa.int32()),  # scored tokens
        ("logprob", pa.float64()),  # nats, sum over the scored tokens; null: none was scored
        ("is_argmax", pa.bool_()),  # every scored token was the vocabulary's argmax; null likewise
        ("entropy", pa.float32()),  # nats, of the distribution at the first scored token; null likewise
        ("options", pa.list_(pa.string())),  # null: the response has no options
        ("option_logprobs", pa.list_(pa.float64())),  # nats, sum over the option's scored tokens; null likewise
        ("option_log_softmax", pa.list_(pa.float64())),  # nats, over the response's options; null likewise
        ("option_index", pa.int32()),  # the option that is the response; null: none is
        ("flag", pa.string()),  # what is unusual about the response; null: nothing
    ]
)


def to_table(transcripts: Sequence[EncodedTranscript], scores: TargetScores) -> pa.Table:
    """One row of :data:`SCHEMA` per response of ``transcripts``, in order.

    ``scores`` are those of exactly these transcripts, by target id; sums over tokens are float64. Raises ValueError
    when the scores or branches do not fit the transcripts.
    """
    num_tokens = csr.concatenate((t.spans_tok[:, 1] - t.spans_tok[:, 0] for t in transcripts), np.int32)  # [R]
    branch_tokens = csr.concatenate((np.diff(t.branch_offsets) - t.branch_scored_tok for t in transcripts), np.int64)
    num_targets = int(num_tokens.sum() + branch_tokens.sum())
    if len(scores.logprob) != num_targets:
        raise ValueError(f"scores: expected {num_targets} targets for these transcripts, got {len(scores.logprob)}")
    columns = _identity_columns(transcripts)
    columns |= _score_columns(scores, num_tokens)
    columns |= _option_columns(transcripts, scores.logprob[num_tokens.sum() :], branch_tokens)
    return pa.table(columns, schema=SCHEMA)


def _identity_columns(transcripts: Sequence[EncodedTranscript]) -> dict[str, pa.Array]:
    num_responses = np.array([len(t.responses) for t in transcripts], dtype=np.int64)  # [transcripts]
    owner = pa.array(np.repeat(np.arange(len(transcripts)), num_responses))  # [R]
    return {
        "study": pa.array([t.study for t in transcripts], pa.string()).take(owner),
        "experiment": pa.array([t.experiment for t in transcripts], pa.string()).take(owner),
        "participant": pa.array([t.participant for t in transcripts], pa.string()).take(owner),
        "response_index": pa.array(csr.places(num_responses), pa.int32()),
        "response": pa.array(list(chain.from_iterable(t.responses for t in transcripts)), pa.string()),
        "flag": pa.array(list(chain.from_iterable(t.flags for t in transcripts)), pa.string()),
    }


def _score_columns(scores: TargetScores, num_tokens: np.ndarray) -> dict[str, pa.Array]:
    offsets = csr.offsets_of(num_tokens)  # [R+1]
    targets = slice(0, offsets[-1])
    unscored = num_tokens == 0
    entropy = np.zeros(len(num_tokens), dtype=np.float32)
    entropy[~unscored] = scores.entropy[offsets[:-1][~unscored]]
    is_argmax = csr.reduce(np.logical_and, scores.is_argmax[targets], offsets)
    logprob = csr.reduce(np.add, scores.logprob[targets].astype(np.float64), offsets)
    return {
        "num_tokens": pa.array(num_tokens, pa.int32()),
        "logprob": pa.array(logprob, pa.float64(), mask=unscored),
        "is_argmax": pa.array(is_argmax, pa.bool_(), mask=unscored),
        "entropy": pa.array(entropy, pa.float32(), mask=unscored),
    }


def _option_columns(
    transcripts: Sequence[EncodedTranscript], branch_target_logprob: np.ndarray, branch_tokens: np.ndarray
) -> dict[str, pa.Array]:
    options = [response_options or () for t in transcripts for response_options in t.options]
    num_options = np.fromiter(map(len, options), dtype=np.int64, count=len(options))  # [R]
    option_index = csr.concatenate((t.option_index for t in transcripts), np.int32)
    _check_branches(transcripts, num_options, branch_tokens)
    if (option_index >= num_options).any():
        raise ValueError("option_index: expected an index into the response's options, got one past their end")
    logprob = csr.reduce(np.add, branch_target_logprob.astype(np.float64), csr.offsets_of(branch_tokens))  # [B]

    def lists(values: pa.Array) -> pa.Array:
        offsets = pa.array(csr.offsets_of(num_options), pa.int32())
        return pa.ListArray.from_arrays(offsets, values, mask=pa.array(num_options == 0))

    return {
        "options": lists(pa.array(list(chain.from_iterable(options)), pa.string())),
        "option_logprobs": lists(pa.array(logprob)),
        "option_log_softmax": lists(pa.array(_segment_log_softmax(logprob, num_options))),
        "option_index": pa.array(option_index, pa.int32(), mask=option_index < 0),
    }


def _check_branches(
    transcripts: Sequence[EncodedTranscript], num_options: np.ndarray, branch_tokens: np.ndarray
) -> None:
    first = 0
    for t in transcripts:
        expected = np.repeat(np.arange(len(t.responses)), num_options[first : first + len(t.responses)])
        if not np.array_equal(t.branch_response, expected):
            raise ValueError(f"{t.study}, {t.participant}: expected one branch per option, in order of response")
        first += len(t.responses)
    if (branch_tokens < 1).any():  # a sum over nothing would read as probability 1
        raise ValueError("branches: expected at least one scored token in each, got one without")


def _segment_log_softmax(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    offsets = csr.offsets_of(counts)
    shifted = values - np.repeat(csr.reduce(np.maximum, values, offsets), counts)
    total = csr.reduce(np.add, np.exp(shifted), offsets)
    log_total: np.ndarray = np.log(np.where(counts > 0, total, 1.0))
    log_softmax: np.ndarray = shifted - np.repeat(log_total, counts)
    return log_softmax
