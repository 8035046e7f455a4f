"""Plans a group of transcripts: what is computed, in which rows, waves and batches, and which row predicts what.

The trie itself (sorting, common prefixes, rows, waves, carried prefixes) is C++: ``csrc/cpu/prefix_trie.h`` says how it
works. This module gives it the transcripts, and finds the row of every target. **The shift happens here and nowhere
else: the row at position p - 1 predicts the token at position p.**

A transcript may begin with tokens whose keys and values a store has already, its *past*: they need no rows, and what
does sees them where the store has them. Those of equal pasts share what comes behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from psykern import _cpu
from psykern.core import csr
from psykern.core.settings import MIN_SHARE
from psykern.core.types import NOTHING_MORE, Targeted, TargetScores, TokenTree, Wanted


@dataclass(frozen=True, slots=True, eq=False)
class Wave:
    """Rows that are computed together, one layer after the other. Filled by :class:`Plan`.

    The wave's key/value store has ``num_carried + N`` rows: first those that are there when it begins, of a past or
    carried from the wave before, then its own.
    A segment here is a run of rows of one batch with one list of visible keys: ranges of store rows. Key j of that list
    is token j of the segment's path; a query at position p sees keys 0 to p.
    A *target* is a token whose log-probability is wanted; the row before it predicts it.
    """

    index: int
    token_ids: np.ndarray  # [N] int32
    positions: np.ndarray  # [N] int32, tokens before this one on its path
    num_carried: int  # C
    keep_rows: np.ndarray  # [C'] int64, ascending rows of the store that the next wave carries
    batch_offsets: np.ndarray  # [B+1] int32, rows of the wave
    batch_segments: np.ndarray  # [B+1] int32, segments of each batch
    segment_offsets: np.ndarray  # [S+1] int32, rows of the wave
    range_offsets: np.ndarray  # [S+1] int32, into key_ranges
    key_ranges: np.ndarray  # [range_offsets[-1], 2] int32, rows of the store
    response_rows: np.ndarray  # [R] int32, ascending rows of the wave that predict a target
    target_offsets: np.ndarray  # [R+1] int64, into target_token_ids
    target_token_ids: np.ndarray  # [nnz] int32
    target_ids: np.ndarray  # [nnz] int64, whose targets these are: indices into TargetScores
    wanted: Wanted  # of each target's distribution


@dataclass(frozen=True, slots=True)
class Past:
    """The first tokens of a transcript, whose keys and values are in the store."""

    length: int  # tokens
    key_ranges: tuple[tuple[int, int], ...]  # rows of the store, half open, in order; ``length`` of them in all


@dataclass(frozen=True, slots=True, eq=False)
class Pasts:
    """The past of each transcript, and the rows of the store before a wave's own."""

    each: Sequence[Past]
    store_rows: int


@dataclass(frozen=True, slots=True, eq=False)
class _Roots:
    """Distinct pasts, as what the trie's sequences go on from."""

    of: np.ndarray  # [T] int32, the root of each transcript
    lengths: np.ndarray  # [roots] int32, tokens
    range_offsets: np.ndarray  # [roots+1] int64, into key_ranges
    key_ranges: np.ndarray  # [range_offsets[-1], 2] int32
    store_rows: int

    @classmethod
    def distinct(cls, pasts: Pasts) -> _Roots:
        roots = {past: root for root, past in enumerate(dict.fromkeys(pasts.each))}
        return cls(
            of=np.array([roots[past] for past in pasts.each], np.int32),
            lengths=np.array([past.length for past in roots], np.int32),
            range_offsets=csr.offsets_of(np.array([len(past.key_ranges) for past in roots], np.int64)),
            key_ranges=np.array([of for past in roots for of in past.key_ranges], np.int32).reshape(-1, 2),
            store_rows=pasts.store_rows,
        )

    def lead(self, segment_roots: np.ndarray, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """What of a wave's ``arrays`` names rows of the store, with each segment's path behind that of its root."""
        before, before_offsets = csr.take(self.key_ranges, self.range_offsets, segment_roots)
        range_offsets = before_offsets + arrays["range_offsets"]
        own = np.arange(len(arrays["key_ranges"])) + np.repeat(before_offsets[1:], np.diff(arrays["range_offsets"]))
        is_own = np.zeros(range_offsets[-1], np.bool_)
        is_own[own] = True
        key_ranges = np.empty((len(is_own), 2), np.int32)
        key_ranges[is_own], key_ranges[~is_own] = arrays["key_ranges"] + np.int32(self.store_rows), before
        return {
            "num_carried": self.store_rows + arrays["num_carried"],
            "keep_rows": self.store_rows + arrays["keep_rows"],
            "range_offsets": range_offsets.astype(np.int32),
            "key_ranges": key_ranges,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The waves of a group of transcripts. ``wave(i)`` builds one wave's arrays on demand, so a plan stays small."""

    num_transcripts: int
    num_responses: int
    num_tokens: int  # of the transcripts up to their last scored token, before sharing
    num_computed: int  # rows after sharing, branches included
    num_branches: int  # options of several tokens that are not one token only
    num_targets: int
    wanted: Wanted
    wave_tokens: int  # rows of a wave, unless more need less memory
    batch_tokens: int  # rows of a batch, at most
    _roots: _Roots | None  # None: no transcript has a past
    _trie: _cpu.PrefixTrie
    _target_rows: np.ndarray  # [targets] int64, ascending
    _target_ids: np.ndarray  # [targets] int64, in order of their rows
    _target_token_ids: np.ndarray  # [targets] int32, likewise

    @property
    def num_waves(self) -> int:
        return self._trie.num_waves

    @property
    def num_response_rows(self) -> int:
        """Distinct rows that predict a target: what the last layer and the head compute."""
        return int((np.diff(self._target_rows, prepend=-1) != 0).sum())

    @property
    def wave_rows(self) -> np.ndarray:
        """[waves] int64, rows of each wave."""
        return np.diff(self._trie.wave_starts)

    @property
    def carried_rows(self) -> np.ndarray:
        """[waves] int64, rows that each wave carries from those before."""
        return self._trie.carried_rows

    @property
    def response_rows(self) -> np.ndarray:
        """[waves] int64, rows of each wave that predict a target."""
        return np.diff(np.searchsorted(np.unique(self._target_rows), self._trie.wave_starts))

    @property
    def max_wave_rows(self) -> int:
        return int(self.wave_rows.max(initial=0))

    @property
    def max_carried_rows(self) -> int:
        return int(self.carried_rows.max(initial=0))

    @property
    def max_response_rows(self) -> int:
        """The most response rows of one wave."""
        return int(self.response_rows.max(initial=0))

    def visible_keys(self, window: int | None) -> int:
        """Keys that all rows see together, under a sliding window or without: what a layer's attention costs."""
        return self._trie.visible_keys(window or np.iinfo(np.int32).max)

    def visible_keys_of_responses(self, window: int | None) -> int:
        """The same of the response rows only: what the last layer's attention costs."""
        keys = self._trie.positions_of(np.unique(self._target_rows)).astype(np.int64) + 1
        return int(np.minimum(keys, window or np.iinfo(np.int32).max).sum())

    def wave(self, index: int) -> Wave:
        arrays = self._trie.wave(index, self.batch_tokens)
        segment_roots = arrays.pop("segment_roots")
        if self._roots is not None:
            arrays |= self._roots.lead(segment_roots, arrays)
        start, end = self._trie.wave_starts[index : index + 2]
        first, last = np.searchsorted(self._target_rows, [start, end])
        rows, counts = np.unique(self._target_rows[first:last], return_counts=True)
        return Wave(
            index=index,
            response_rows=(rows - start).astype(np.int32),
            target_offsets=csr.offsets_of(counts),
            target_token_ids=self._target_token_ids[first:last],
            target_ids=self._target_ids[first:last],
            wanted=self.wanted,
            **arrays,
        )

    def rows_of(self, transcript: int, num_tokens: int) -> np.ndarray:
        """The rows of the first ``num_tokens`` tokens behind the past of a transcript, [num_tokens] int64."""
        positions = np.arange(1, num_tokens + 1, dtype=np.int32)
        return self._trie.locate(np.full(num_tokens, transcript, np.int64), positions)

    def waves(self) -> Iterator[Wave]:
        return (self.wave(index) for index in range(self.num_waves))


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """All transcripts end to end; every span and branch says which transcript it is of."""

    token_ids: np.ndarray  # [tokens] int32
    offsets: np.ndarray  # [T+1] int64, into token_ids
    spans: np.ndarray  # [responses, 2] int32, tokens of the transcript
    span_sequence: np.ndarray  # [responses] int64, transcripts
    branch_sequence: np.ndarray  # [B] int64, transcripts
    branch_parent: np.ndarray  # [B] int32, tokens of the transcript before the branch
    branch_scored: np.ndarray  # [B] int32, first scored token, counted within the branch
    branch_offsets: np.ndarray  # [B+1] int64, into branch_token_ids
    branch_token_ids: np.ndarray  # [branch_offsets[-1]] int32

    @classmethod
    def of(cls, transcripts: Sequence[Targeted]) -> _Group:
        sequences = np.arange(len(transcripts))
        return cls(
            token_ids=csr.concatenate([t.token_ids for t in transcripts], np.int32),
            offsets=csr.offsets_of(np.array([len(t.token_ids) for t in transcripts], np.int64)),
            spans=csr.concatenate([t.spans_tok for t in transcripts], np.int32).reshape(-1, 2),
            span_sequence=np.repeat(sequences, [len(t.spans_tok) for t in transcripts]),
            branch_sequence=np.repeat(sequences, [len(t.branch_parent_tok) for t in transcripts]),
            branch_parent=csr.concatenate([t.branch_parent_tok for t in transcripts], np.int32),
            branch_scored=csr.concatenate([t.branch_scored_tok for t in transcripts], np.int32),
            branch_offsets=csr.offsets_of(csr.concatenate([np.diff(t.branch_offsets) for t in transcripts], np.int64)),
            branch_token_ids=csr.concatenate([t.branch_token_ids for t in transcripts], np.int32),
        )

    def lengths(self) -> np.ndarray:
        """[T] int64, tokens that something scored comes after."""
        lengths = np.zeros(len(self.offsets) - 1, np.int64)
        starts, ends = self.spans.T
        np.maximum.at(lengths, self.span_sequence, np.where(ends > starts, ends - 1, 0))
        np.maximum.at(lengths, self.branch_sequence, self.branch_parent)
        return lengths

    def trie(self, roots: _Roots | None, *, wave_tokens: int, carried_price: float, min_share: int) -> _cpu.PrefixTrie:
        return _cpu.PrefixTrie(
            token_ids=self.token_ids,
            offsets=self.offsets,
            lengths=self.lengths() if roots is None else np.diff(self.offsets),
            root=np.zeros(len(self.offsets) - 1, np.int32) if roots is None else roots.of,
            root_base=np.zeros(1, np.int32) if roots is None else roots.lengths,
            branch_sequence=self.branch_sequence,
            branch_parent=self.branch_parent,
            branch_scored=self.branch_scored,
            branch_offsets=self.branch_offsets,
            branch_token_ids=self.branch_token_ids,
            min_share=min_share,
            wave_tokens=wave_tokens,
            carried_price=carried_price,
        )

    def targets(self, trie: _cpu.PrefixTrie) -> tuple[np.ndarray, np.ndarray]:
        """The row that predicts each target, [targets] int64, and the token it is, [targets] int32, in the order of
        ``TargetScores``: first those of all spans, then those of all branches. :func:`scores_of_each` takes them apart.
        """
        span, position = csr.members(*self.spans.T)
        sequence = self.span_sequence[span]
        branch, place = csr.members(self.branch_scored, np.diff(self.branch_offsets))
        rows = (trie.locate(sequence, position.astype(np.int32)), trie.branch_target_rows)
        spans = self.token_ids[self.offsets[sequence] + position]
        branches = self.branch_token_ids[self.branch_offsets[branch] + place]
        return np.concatenate(rows), np.concatenate((spans, branches))


def plan(
    transcripts: Sequence[Targeted],
    *,
    wave_tokens: int,
    batch_tokens: int,
    carried_price: float = 0.0,
    min_share: int = MIN_SHARE,
    wanted: Wanted = NOTHING_MORE,
    pasts: Pasts | None = None,
) -> Plan:
    """Plan ``transcripts``, which should be of one study: prefixes are shared among them.

    A wave computes at most ``wave_tokens`` rows, and more where that needs less memory than what the next one would
    carry: a carried row needs as much as ``carried_price`` rows of a wave (of a model, ``Budgets`` says it; 0: no wave
    has more). A batch computes at most ``batch_tokens``; a prefix is shared from ``min_share`` tokens on. ``wanted``:
    of every target's distribution. ``pasts``: of each transcript, of no more than its :func:`most_past`; then all
    tokens behind get rows, whether something scored comes after them or not, for they will be a past.

    Raises ``ValueError`` for budgets below 1, and a price below 0.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens: expected at least 1, got {batch_tokens}")
    roots = None
    if pasts is not None:
        roots = _Roots.distinct(pasts)
        transcripts = [_behind(t, past.length) for t, past in zip(transcripts, pasts.each, strict=True)]
    group = _Group.of(transcripts)
    trie = group.trie(roots, wave_tokens=wave_tokens, carried_price=carried_price, min_share=min_share)
    rows, token_ids = group.targets(trie)
    order = np.argsort(rows, kind="stable")
    return Plan(
        num_transcripts=len(transcripts),
        num_responses=len(group.spans),
        num_tokens=len(group.token_ids),
        num_computed=trie.num_rows,
        num_branches=int((np.diff(group.branch_offsets) > 1).sum()),
        num_targets=len(rows),
        wanted=wanted,
        wave_tokens=wave_tokens,
        batch_tokens=batch_tokens,
        _roots=roots,
        _trie=trie,
        _target_rows=rows[order],
        _target_ids=order,
        _target_token_ids=token_ids[order],
    )


def most_past(t: Targeted) -> int:
    """Tokens of ``t`` that need no row if the store has them: the first target is predicted by a row behind them."""
    starts, ends = t.spans_tok.T
    rows = [starts[ends > starts] - 1, t.branch_parent_tok + np.minimum(t.branch_scored_tok - 1, 0)]
    return int(np.concatenate(rows).min(initial=len(t.token_ids)))


def _behind(t: Targeted, length: int) -> TokenTree:
    """``t`` without its first ``length`` tokens."""
    return TokenTree(
        token_ids=t.token_ids[length:],
        spans_tok=t.spans_tok - length,
        branch_parent_tok=t.branch_parent_tok - length,
        branch_scored_tok=t.branch_scored_tok,
        branch_offsets=t.branch_offsets,
        branch_token_ids=t.branch_token_ids,
    )


def scores_of_each(items: Sequence[Targeted], scores: TargetScores) -> Iterator[TargetScores]:
    """The scores of each of ``items``, which were planned together: those of its spans, then those of its branches."""
    spans = [int((t.spans_tok[:, 1] - t.spans_tok[:, 0]).sum()) for t in items]
    branches = [len(t.branch_token_ids) - int(t.branch_scored_tok.sum()) for t in items]
    first, behind = 0, sum(spans)
    for num_spans, num_branches in zip(spans, branches, strict=True):
        own = (slice(first, first + num_spans), slice(behind, behind + num_branches))
        yield TargetScores(**{f.name: _joined(getattr(scores, f.name), own) for f in fields(TargetScores)})
        first, behind = first + num_spans, behind + num_branches


def joined(scores: Sequence[TargetScores]) -> TargetScores:
    """The scores of what follows each other, as one."""
    if len(scores) == 1:
        return scores[0]
    columns: dict[str, Any] = {f.name: [getattr(of, f.name) for of in scores] for f in fields(TargetScores)}
    whole: dict[str, Any] = {name: None if of[0] is None else np.concatenate(of) for name, of in columns.items()}
    return TargetScores(**whole)


def _joined(array: np.ndarray | None, parts: Sequence[slice]) -> Any:
    return None if array is None else np.concatenate([array[part] for part in parts])
