"""The plan against a brute-force reading of what it must mean: every target is predicted by a row whose visible keys,
read in order, are exactly the tokens before the target; and nothing that is shared is computed twice."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from support.groups import encoded, random_group, wanted

from psykern import _cpu
from psykern.core.types import EncodedTranscript
from psykern.engine.plan import Past, Pasts, Plan, most_past, plan


def predicted(p: Plan, known: Sequence[int] = ()) -> dict[int, tuple[list[int], int]]:
    """The same as the waves say it, following their key ranges through a store that only carries what they name, behind
    rows of ``known`` tokens."""
    out: dict[int, tuple[list[int], int]] = {}
    carried: list[int] = []
    for wave in p.waves():
        assert wave.num_carried == len(known) + len(carried)
        store = [*known, *carried, *wave.token_ids.tolist()]
        assert wave.batch_offsets[0] == 0
        assert wave.batch_offsets[-1] == len(wave.token_ids)
        assert (wave.segment_offsets[wave.batch_segments] == wave.batch_offsets).all()
        assert (np.diff(wave.batch_offsets) <= p.batch_tokens).all()
        paths: list[list[int]] = []
        for s in range(len(wave.segment_offsets) - 1):
            ranges = wave.key_ranges[wave.range_offsets[s] : wave.range_offsets[s + 1]].tolist()
            assert all(a[1] != b[0] for a, b in pairwise(ranges) if a[0] >= len(known)), "adjacent ranges are merged"
            path = [row for begin, end in ranges for row in range(begin, end)]
            first, last = wave.segment_offsets[s : s + 2].tolist()
            assert path[-(last - first) :] == [wave.num_carried + r for r in range(first, last)]
            for row in range(first, last):
                position = int(wave.positions[row])
                assert position == len(path) - (last - row)
                assert max(path) < wave.num_carried + last, "a key is computed before or with its query's batch"
                paths.append([store[k] for k in path[: position + 1]])
        for r, row in enumerate(wave.response_rows.tolist()):
            for i in range(wave.target_offsets[r], wave.target_offsets[r + 1]):
                target = int(wave.target_ids[i])
                assert target not in out
                out[target] = (paths[row], int(wave.target_token_ids[i]))
        carried = [store[k] for k in wave.keep_rows.tolist()]
    assert not carried, "nothing is carried past the last wave"
    return out


def check(
    transcripts: Sequence[EncodedTranscript],
    *,
    wave_tokens: int = 64,
    batch_tokens: int = 16,
    min_share: int = 1,
    carried_price: float = 0.0,
) -> Plan:
    p = plan(
        transcripts,
        wave_tokens=wave_tokens,
        batch_tokens=batch_tokens,
        min_share=min_share,
        carried_price=carried_price,
    )
    expected = wanted(transcripts)
    got = predicted(p)
    assert p.num_targets == len(expected) == len(got)
    assert [got[i] for i in range(len(expected))] == expected
    return p


def trie_nodes(transcripts: Sequence[EncodedTranscript]) -> int:
    """Distinct contexts that anything wanted needs: the fewest rows possible."""
    return len({tuple(context[:k]) for context, _ in wanted(transcripts) for k in range(1, len(context) + 1)})


@pytest.mark.parametrize("options", [0, 3], ids=["no-options", "options"])
@pytest.mark.parametrize("vocabulary", [2, 5, 1000])
@pytest.mark.parametrize(("wave_tokens", "batch_tokens"), [(1, 1), (7, 3), (64, 64), (10_000, 16)])
@pytest.mark.parametrize("min_share", [1, 4, 1_000_000])
def test_random_groups_mean_what_was_asked(
    options: int, vocabulary: int, wave_tokens: int, batch_tokens: int, min_share: int
) -> None:
    rng = np.random.default_rng([options, vocabulary, wave_tokens, min_share])
    for _ in range(12):
        group = random_group(rng, int(rng.integers(0, 9)), vocabulary, options)
        p = check(group, wave_tokens=wave_tokens, batch_tokens=batch_tokens, min_share=min_share)
        if min_share == 1:
            assert p.num_computed == trie_nodes(group)


@pytest.mark.parametrize("carried_price", [0.0, 0.3, 4.0, 25.0, 1e6])
@pytest.mark.parametrize("wave_tokens", [1, 20, 150])
@pytest.mark.parametrize("vocabulary", [2, 1000])
def test_a_wave_ends_where_least_memory_is_needed(vocabulary: int, wave_tokens: int, carried_price: float) -> None:
    """A wave's rows beyond the budget, and what the next one carries at its price, are no more than they would be with
    any end from where the budget is full; what is carried is the path to the next row, so its depth counts it."""
    rng = np.random.default_rng([vocabulary, wave_tokens, int(carried_price)])
    for _ in range(8):
        group = random_group(rng, int(rng.integers(1, 9)), vocabulary, 3)
        p = check(group, wave_tokens=wave_tokens, carried_price=carried_price)
        assert p.num_computed == trie_nodes(group)
        depth = np.array([position for wave in p.waves() for position in wave.positions] + [0])  # 0: behind the last
        ends = p.wave_rows.cumsum()
        assert p.carried_rows.tolist() == [0, *depth[ends[:-1]].tolist()][: p.num_waves]
        for begin, end in zip(ends - p.wave_rows, ends, strict=True):
            places = np.arange(min(begin + wave_tokens, len(depth) - 1), len(depth))
            memory = np.maximum(places - begin - wave_tokens, 0) + carried_price * depth[places]
            assert max(0, end - begin - wave_tokens) + carried_price * depth[end] <= memory.min()


def stored(
    rng: np.random.Generator, transcripts: Sequence[EncodedTranscript], most_rows: int
) -> tuple[Pasts, list[int]]:
    """A past of a random length for each transcript, and the tokens of a store that has them in random pieces."""
    known = rng.integers(1000, 2000, size=most_rows).tolist()  # what no transcript holds
    places: dict[tuple[int, ...], Past] = {}
    at, each = 0, []
    for t in transcripts:
        tokens = t.token_ids[: rng.integers(most_past(t) + 1)].tolist()
        ranges = []
        for cut in np.split(np.array(tokens), np.sort(rng.integers(len(tokens) + 1, size=2))):
            at += int(rng.integers(1, 4))
            known[at : at + len(cut)] = cut.tolist()
            ranges += [(at, at + len(cut))] if len(cut) else []
            at += len(cut)
        each.append(places.setdefault(tuple(tokens), Past(len(tokens), tuple(ranges))))
    return Pasts(each, len(known)), known


@pytest.mark.parametrize("options", [0, 3], ids=["no-options", "options"])
@pytest.mark.parametrize(("wave_tokens", "batch_tokens"), [(7, 3), (10_000, 16)])
@pytest.mark.parametrize("vocabulary", [2, 1000])
def test_a_past_is_seen_and_not_computed(options: int, wave_tokens: int, batch_tokens: int, vocabulary: int) -> None:
    rng = np.random.default_rng([options, wave_tokens, vocabulary])
    for _ in range(20):
        group = random_group(rng, int(rng.integers(1, 9)), vocabulary, options)
        pasts, known = stored(rng, group, 4000)
        p = plan(group, wave_tokens=wave_tokens, batch_tokens=batch_tokens, min_share=1, pasts=pasts)
        got, expected = predicted(p, known), wanted(group)
        assert [got[i] for i in range(len(expected))] == expected
        needed = [(t, t.token_ids.tolist()) for t in group] + [
            (t, context) for t in group for context, _ in wanted([t])
        ]
        past_of = {id(t): past for t, past in zip(group, pasts.each, strict=True)}
        computed = {
            (past_of[id(t)], *tokens[:k])
            for t, tokens in needed
            for k in range(past_of[id(t)].length + 1, len(tokens) + 1)
        }
        assert p.num_computed == len(computed)
        positions = np.concatenate([w.positions for w in p.waves()] or [np.empty(0)]) + 1
        assert p.visible_keys(5) == np.minimum(positions, 5).sum()
        responses = np.concatenate([w.positions[w.response_rows] for w in p.waves()] or [np.empty(0)]) + 1
        assert p.visible_keys_of_responses(None) == responses.sum()


def test_the_rows_of_a_transcript_are_those_of_its_tokens() -> None:
    group = [encoded(range(30), [(20, 21)]), encoded([*range(12), *range(50, 60)], [])]
    pasts = Pasts([Past(10, ((5, 15),)), Past(10, ((5, 15),))], 100)
    p = plan(group, wave_tokens=64, batch_tokens=8, min_share=1, pasts=pasts)
    (wave,) = p.waves()
    assert p.num_computed == 20 + 10
    for t, count in ((0, 20), (1, 12)):
        rows = p.rows_of(t, count)
        assert wave.token_ids[rows].tolist() == group[t].token_ids[10:].tolist()
        assert wave.positions[rows].tolist() == list(range(10, 10 + count))


def test_a_past_that_holds_the_row_before_a_target_is_refused() -> None:
    group = [encoded(range(30), [(20, 21)])]
    assert most_past(group[0]) == 19
    with pytest.raises(ValueError, match="position 0 has no row before it"):
        plan(group, wave_tokens=64, batch_tokens=8, pasts=Pasts([Past(20, ((0, 20),))], 20))
    branch = [encoded(range(30), [], [(0, 7, [1, 2], 0)])]
    assert most_past(branch[0]) == 6
    with pytest.raises(ValueError, match="scored: expected 1 to 1, got 0"):
        plan(branch, wave_tokens=64, batch_tokens=8, pasts=Pasts([Past(7, ((0, 7),))], 20))
    assert most_past(encoded(range(30), [(4, 4)], [(0, 7, [1, 2], 1)])) == 7


@pytest.mark.parametrize(
    ("root", "root_base", "message"),
    [
        ([0, 2], [0, 4], r"root\[1\]: expected 0 to 1, got 2"),
        ([-1, 0], [0, 4], r"root\[0\]: expected 0 to 1, got -1"),
        ([0, 1], [0, -4], r"root_base\[1\]: expected no negative number"),
        ([0, 1], [2**31 - 2, 4], r"lengths\[0\]"),
        ([0], [0], r"root: expected shape \[2\]"),
    ],
)
def test_roots_that_are_none_are_refused(root: list[int], root_base: list[int], message: str) -> None:
    none = np.empty(0, np.int32)
    with pytest.raises(ValueError, match=message):
        _cpu.PrefixTrie(
            token_ids=np.arange(8, dtype=np.int32),
            offsets=np.array([0, 4, 8]),
            lengths=np.array([4, 4]),
            root=np.array(root, np.int32),
            root_base=np.array(root_base, np.int32),
            branch_sequence=np.empty(0, np.int64),
            branch_parent=none,
            branch_scored=none,
            branch_offsets=np.zeros(1, np.int64),
            branch_token_ids=none,
            min_share=1,
            wave_tokens=8,
        )


def test_equal_transcripts_cost_one() -> None:
    one = encoded(range(40), [(10, 12), (39, 40)])
    assert check([one] * 5).num_computed == 39


def test_a_prefix_of_another_costs_nothing() -> None:
    assert check([encoded(range(40), [(39, 40)]), encoded(range(20), [(19, 20)])]).num_computed == 39


def test_short_shares_are_not_taken() -> None:
    group = [encoded([*range(10), 50 + i, *range(60, 80)], [(30, 31)]) for i in range(4)]
    assert check(group, min_share=10).num_computed == 10 + 4 * 20
    assert check(group, min_share=11).num_computed == 4 * 30


def test_tokens_after_the_last_response_and_the_response_itself_need_no_row() -> None:
    assert check([encoded(range(100), [(3, 5)])]).num_computed == 4


def test_one_token_options_need_no_row() -> None:
    branches = [(0, 8, [i], 0) for i in range(5)]
    p = check([encoded(range(9), [(8, 9)], branches)])
    assert (p.num_computed, p.num_response_rows, p.num_branches) == (8, 1, 0)


def test_branches_share_with_each_other_and_with_every_transcript() -> None:
    a = encoded(
        [0, 1, 2, 20, 21, 9, 9], [(3, 5), (6, 7)], [(0, 3, [20, 21], 0), (0, 3, [30, 31], 0), (0, 3, [30, 32], 0)]
    )
    b = encoded(
        [0, 1, 2, 30, 31, 8, 8], [(3, 5), (6, 7)], [(0, 3, [20, 21], 0), (0, 3, [30, 31], 0), (0, 3, [30, 32], 0)]
    )
    assert check([a, b]).num_computed == len([0, 1, 2]) + 3 + 3


def test_a_transcript_longer_than_a_wave_is_split_and_carried() -> None:
    p = check([encoded(range(1000), [(500, 502), (999, 1000)])], wave_tokens=64)
    assert p.num_waves == 16
    assert p.max_carried_rows == 15 * 64


def test_a_transcript_longer_than_a_wave_is_one_where_that_needs_less_memory() -> None:
    """935 rows beyond the budget against 64 that would be carried first, and 128 then."""
    group = [encoded(range(1000), [(500, 502), (999, 1000)])]
    whole = check(group, wave_tokens=64, carried_price=15.0)
    assert (whole.max_wave_rows, whole.max_carried_rows) == (999, 0)
    assert check(group, wave_tokens=64, carried_price=14.5).max_wave_rows == 999 - 64


def test_options_go_with_the_transcript_that_they_continue() -> None:
    """The budget is full among options of its last response: a few rows more, and 60 are not carried."""
    branches = [(0, 60, [200 + i, 300, 301], 0) for i in range(10)]
    one, other = encoded(range(61), [(60, 61)], branches), encoded(range(100, 150), [(49, 50)])
    p = check([one, other], wave_tokens=64, carried_price=1.0)
    assert p.wave_rows.tolist() == [60 + 10 * 2, 49]
    assert p.max_carried_rows == 0


def test_a_front_that_many_share_is_carried_until_it_costs_more_than_all_of_them() -> None:
    group = [encoded([*range(20), *range(100 * i + 100, 100 * i + 144)], [(63, 64)]) for i in range(30)]
    p = check(group, wave_tokens=63, carried_price=24.0)
    assert p.wave_rows.tolist() == [20 + 43, *[43] * 17, 12 * 43]  # the last 12 are 453 rows beyond, or 20 * 24
    assert p.carried_rows.tolist() == [0, *[20] * 18]
    assert check(group, wave_tokens=63, carried_price=62.5).num_waves == 1  # 29 * 43 rows beyond, or 20 * 62.5


def test_only_what_later_waves_need_is_carried() -> None:
    shared, group = list(range(20)), []
    for i in range(30):
        group.append(encoded([*shared, *range(100 * i + 100, 100 * i + 144)], [(63, 64)]))
    p = check(group, wave_tokens=63)
    assert p.max_carried_rows == 20
    assert p.num_computed == 20 + 30 * 43


def test_no_transcripts_and_no_responses() -> None:
    assert check([]).num_waves == 0
    assert check([encoded([], [])]).num_waves == 0
    assert check([encoded([], []), encoded(range(5), [(4, 5)])]).num_computed == 4


def test_visible_keys_count_what_attention_reads() -> None:
    group = random_group(np.random.default_rng(3), 8, 4, 2)
    p = check(group)
    positions = np.concatenate([w.positions for w in p.waves()]) + 1
    responses = np.concatenate([w.positions[w.response_rows] for w in p.waves()]) + 1
    for window in (None, 1, 5):
        assert p.visible_keys(window) == np.minimum(positions, window or 10**9).sum()
        assert p.visible_keys_of_responses(window) == np.minimum(responses, window or 10**9).sum()
    assert p.num_response_rows == len(responses)
    assert p.max_response_rows == max(len(w.response_rows) for w in p.waves())


def test_order_of_transcripts_does_not_change_the_rows() -> None:
    group = random_group(np.random.default_rng(4), 9, 3, 0)
    rows = [np.concatenate([w.token_ids for w in check(g).waves()]).tolist() for g in (group, group[::-1])]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("budget", ["wave_tokens", "batch_tokens", "min_share"])
def test_budgets_below_one_are_refused(budget: str) -> None:
    with pytest.raises(ValueError, match=budget):
        check([encoded(range(5), [(4, 5)])], **{budget: 0})


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_a_price_that_is_none_is_refused(price: float) -> None:
    with pytest.raises(ValueError, match="carried_price: expected a finite number"):
        check([encoded(range(5), [(4, 5)])], carried_price=price)


def test_a_branch_without_a_token_before_it_is_refused() -> None:
    with pytest.raises(ValueError, match="branch 0: scored: expected 1 to 1, got 0"):
        check([encoded(range(5), [(1, 2)], [(0, 0, [3, 4], 0)])])


def test_a_branch_that_changes_the_first_token_stands_alone() -> None:
    """Its rows start anew at the root, where it shares what others of its kind begin with."""
    options = [(0, 0, [7, 8, 9], 1), (0, 0, [7, 8, 5], 2), (0, 1, [6], 0)]
    p = check([encoded(range(5), [(1, 2)], options)])
    assert p.num_computed == 1 + 2


def test_100_000_transcripts_take_seconds_and_little_memory() -> None:
    rng = np.random.default_rng(0)
    instructions = rng.integers(150_000, size=300)
    group = [
        encoded(
            np.concatenate((instructions, rng.integers(150_000, size=700))), [(p, p + 1) for p in range(350, 1000, 30)]
        )
        for _ in range(10_000)
    ]
    tracemalloc.start()
    start = time.perf_counter()
    p = plan(group * 10, wave_tokens=32_768, batch_tokens=2048)  # 100,000 transcripts, each ten times
    seconds = time.perf_counter() - start
    assert p.num_computed == 300 + 10_000 * 680
    first = p.wave(0)
    assert len(first.token_ids) <= 32_768
    _, peak = tracemalloc.get_traced_memory()  # numpy's share: the tokens once, and the targets
    tracemalloc.stop()
    assert peak < 4 * 100_000 * 980 * 4
    assert seconds < 60
