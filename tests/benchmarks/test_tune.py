"""What tune.py gives attention: a run's own batches, and kernels that were compiled beforehand."""

from __future__ import annotations

import os
import time

import pytest
import torch
from side_by_side import run_in_processes

pytest.importorskip("triton")

import tune
from bench_prefix_attention import Heads
from triton_resources import _specialized, recording
from wave_batches import largest_batches

CPU = torch.device("cpu")
AT = tune.Setting(CPU, torch.bfloat16)


def test_batches_hold_every_row_of_the_waves_once() -> None:
    """Rows of one budget and of another are the same tokens, so that the pairs are too."""
    small = largest_batches("Qwen3-0.6B", None, CPU, torch.bfloat16, tune.Budgets(3000, 700))
    large = largest_batches("Qwen3-0.6B", None, CPU, torch.bfloat16, tune.Budgets(131_072, 16_384))
    assert sum(b.num_queries for b in small) == sum(b.num_queries for b in large)
    assert sum(b.pairs for b in small) == sum(b.pairs for b in large)
    assert max(b.num_queries for b in small) <= 700 < max(b.num_queries for b in large) <= 16_384
    assert [b.pairs for b in small] == sorted((b.pairs for b in small), reverse=True)
    for batch in small:
        assert int(batch.segments.key_ranges.max()) <= batch.store_rows


def test_pairs_are_counted_by_hand() -> None:
    """3 tokens see 1 + 2 + 3 keys; with a window of 2 they see 1 + 2 + 2."""
    heads = Heads(4, 2, 16)
    assert tune.attention("causal", heads, 3, None, AT)[1] == 6
    assert tune.attention("window", heads, 3, 2, AT)[1] == 5


@pytest.mark.parametrize("heads", [Heads(32, 8, 128), Heads(16, 8, 128), Heads(14, 2, 64)])
def test_what_is_compiled_beforehand_is_what_the_cases_need(heads: Heads, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's own account of what a launch is specialised on."""
    monkeypatch.setattr(tune, "FEW_TOKENS", 48)
    batches = largest_batches("Qwen3-0.6B", None, CPU, torch.bfloat16, tune.Budgets(3000, 700))[:1]
    needed = [tune.wave_attention(batches, heads, AT)]
    needed += [
        tune.attention(name, heads, 300, 70 if name == "window" else None, AT)[0]
        for name in tune.ATTENTION
        if name != "wave"
    ]
    names = list(tune.ATTENTION)
    few = [case for case in tune.attention_cases(names, AT, few=True) if case.name.endswith(f"of {heads.size}")]
    few = [case for case in few if f" {heads.queries} ({heads.keys})" in case.name]
    assert len(few) == 2
    for a, alternative in enumerate([tune.Alternative(tune.TABLE, {}), *few[0].alternatives]):
        compiled = [specialization(case.call, case, alternative) for case in few]
        assert compiled[0] != compiled[1], a
        for call in needed:
            assert specialization(call, few[0], alternative) in compiled


def test_an_alternative_for_experts_is_launched_otherwise_than_the_table_or_is_the_table() -> None:
    """Nothing runs. With few rows the table has smaller tiles; where Triton sets no fence, it has registers."""
    cases = list(tune.expert_cases(AT, num_experts=8))
    assert [case.op for case in cases] == ["expert_swiglu", "expert_linear"] * 2
    for case, small in zip(cases, ["", "", "64x64x64x4x4", "64x128x64x4x4"], strict=True):
        launched = {}
        for alternative in [tune.Alternative(tune.TABLE, {}), *case.alternatives]:
            with recording(hopper=True) as launches, tune.instead(case, alternative):
                case.call()
            constants = {k: v for k, v in launches[-1].arguments.items() if k.isupper()}
            launched[alternative.name] = (constants, launches[-1].options)
        assert {name for name, one in launched.items() if one == launched[tune.TABLE]} <= {"table", "registers", small}
        assert not small or launched[small] == launched[tune.TABLE]


def specialization(call, case: tune.Case, alternative: tune.Alternative) -> object:  # type: ignore[no-untyped-def]
    with recording(hopper=True) as launches, tune.instead(case, alternative):
        call()
    signature, constants, attributes = _specialized(launches[0].kernel, launches[0].arguments)
    return signature, {k: str(v) for k, v in constants.items()}, attributes, launches[0].options


def test_processes_that_fail_are_named_and_cost_no_other() -> None:
    def fail() -> None:
        raise ValueError("no\nsuch kernel")

    tasks = {"good": lambda: None, "bad": fail, "dead": lambda: os._exit(5), "slow": lambda: time.sleep(60)}
    start = time.monotonic()
    failures = run_in_processes({**tasks, "last": lambda: None}, processes=2, seconds=1.0)
    assert time.monotonic() - start < 20
    assert failures == {
        "bad": "ValueError: no such kernel",
        "dead": "ended with exit status 5",
        "slow": "ended with exit status -9",
    }


def test_tasks_run_side_by_side() -> None:
    start = time.monotonic()
    assert run_in_processes({str(i): lambda: time.sleep(0.5) for i in range(6)}, processes=6) == {}
    assert time.monotonic() - start < 2.5


def test_what_failed_beforehand_or_is_not_asked_for_is_left_out() -> None:
    heads, names = Heads(32, 8, 128), ["128x64x32x8x3", "64x128x32x4x2"]
    for name, kernel in (("wave, 14 batches", "causal"), ("branches", "causal"), ("window", "window")):
        case = tune.attention_case(name, heads, AT, list, 1)
        failed = {(f"{kernel}, 32 (8) of 128", names[1]), ("causal, 16 (8) of 128", names[0])}
        assert {"loads", *names} < {a.name for a in case.alternatives}
        assert [a.name for a in tune.chosen(case, names).alternatives] == names
        assert [a.name for a in tune.chosen(case, names, failed).alternatives] == names[:1]


def test_an_alternative_may_be_another_function() -> None:
    case = tune.attention_case("causal", Heads(4, 2, 16), AT, *tune.attention("causal", Heads(4, 2, 16), 3, None, AT))
    marked = torch.ones(1)
    with tune.instead(case, tune.Alternative("other", {"prefix_attention": lambda *arguments: marked})):
        assert case.call()[0] is marked
