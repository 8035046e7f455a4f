"""Random transcripts as tokens, without a tokenizer, and what is wanted of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from psykern.core.errors import Source
from psykern.core.types import EncodedTranscript

Branch = tuple[int, int, list[int], int]  # response, parent_tok, token ids, first scored


def encoded(
    token_ids: Sequence[int], spans: Sequence[tuple[int, int]], branches: Sequence[Branch] = (), **changes: Any
) -> EncodedTranscript:
    """A transcript as `encode` would give it, from its tokens alone; ``changes`` are fields that tokens do not tell."""
    made = EncodedTranscript(
        study="s",
        experiment="e",
        participant="p",
        source=Source("test", 1),
        token_ids=np.array(token_ids, np.int32),
        responses=("x",) * len(spans),
        spans_tok=np.array(spans, np.int32).reshape(-1, 2),
        flags=(None,) * len(spans),
        options=(None,) * len(spans),
        option_index=np.full(len(spans), -1, np.int32),
        branch_response=np.array([b[0] for b in branches], np.int32),
        branch_parent_tok=np.array([b[1] for b in branches], np.int32),
        branch_scored_tok=np.array([b[3] for b in branches], np.int32),
        branch_offsets=np.cumsum([0] + [len(b[2]) for b in branches]).astype(np.int64),
        branch_token_ids=np.array([t for b in branches for t in b[2]], np.int32),
        num_dropped=0,
    )
    return replace(made, **changes)


def wanted(transcripts: Sequence[EncodedTranscript]) -> list[tuple[list[int], int]]:
    """By target id: the tokens before the target, and the target."""
    out = []
    for t in transcripts:
        tokens = t.token_ids.tolist()
        out += [(tokens[:p], tokens[p]) for start, end in t.spans_tok.tolist() for p in range(start, end)]
    for t in transcripts:
        for b, parent in enumerate(t.branch_parent_tok.tolist()):
            first, last = t.branch_offsets[b : b + 2]
            branch = t.branch_token_ids[first:last].tolist()
            context = t.token_ids[:parent].tolist()
            out += [(context + branch[:k], branch[k]) for k in range(t.branch_scored_tok[b], len(branch))]
    return out


def random_group(rng: np.random.Generator, count: int, vocabulary: int, options: int) -> list[EncodedTranscript]:
    group = []
    for _ in range(count):
        base = rng.integers(vocabulary, size=rng.integers(1, 60))
        if group and rng.random() < 0.8:  # start like an earlier one
            other = group[rng.integers(len(group))].token_ids
            base = np.concatenate((other[: rng.integers(len(other) + 1)], base))
        cuts = np.unique(rng.integers(1, len(base) + 1, size=rng.integers(0, 9)))
        spans = [(int(a), int(b)) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
        branches = []
        for r, (start, _) in enumerate(spans):
            for _ in range(options):
                parent = int(rng.integers(max(0, start - 2), start + 1))  # 0: an option changes the first token
                tokens = rng.integers(vocabulary, size=start - parent + rng.integers(1, 5)).tolist()
                branches.append((r, parent, tokens, start - parent))
        group.append(encoded(base[: max((e for _, e in spans), default=0)].tolist(), spans, branches))
    return group


def assert_equal(got: EncodedTranscript, expected: EncodedTranscript) -> None:
    for f in fields(EncodedTranscript):
        one, two = getattr(got, f.name), getattr(expected, f.name)
        if isinstance(two, np.ndarray):
            assert one.dtype == two.dtype and one.shape == two.shape and np.array_equal(one, two), f.name
        else:
            assert one == two and type(one) is type(two), f.name
