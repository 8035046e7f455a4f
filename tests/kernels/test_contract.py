"""What every operation keeps to, in every backend: an item alone is what it is in company, inputs stay as they are, all
of the outputs is written, into inputs too where that is allowed, and rows may lie apart. ``support.ops`` has the table.

psykern promises equal bits of what it computes itself: elementwise operations, and the products in C++. The products of
``reference`` are the vendor's, and those of ``triton`` under its interpreter numpy's; both may round one row otherwise
than many, or than the same row elsewhere in memory. These are held to the operation's tolerance.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.backends import Place, assert_agrees, assert_same_bits, each_place, short
from support.calls import OPS
from support.ops import Case, cases, map_tensors, put, tensors, with_gaps
from torch import Tensor

CASES = {f"{name}-{short(d)}": case for d in (torch.float32, torch.bfloat16) for name, case in cases(d).items()}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_aliased = pytest.mark.parametrize(
    ("case", "taken"),
    [
        pytest.param(case, taken, id="-".join((name, *taken.values())))
        for name, case in CASES.items()
        for taken in case.may_be
    ],
)


def test_every_operation_is_in_the_table() -> None:
    assert {case.op for case in CASES.values()} == set(OPS)


def agree(place: Place, case: Case, actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_agrees(place, one, other, case.tolerance)


def agree_elsewhere(place: Place, case: Case, actual: list[Tensor], expected: list[Tensor]) -> None:
    """Like ``agree``, for rows that lie otherwise in memory. Triton's compiler for GPUs takes another width of loads
    where rows are less aligned, and so another order of a sum (seen on an H200: the last bit of a norm in fp32)."""
    is_compiled = place.backend == "triton" and place.device.type == "cuda"
    for one, other in zip(actual, expected, strict=True):
        assert_agrees(place, one, other, 1e-6 if is_compiled and case.tolerance is None else case.tolerance)


@each_place
@each_case
def test_inputs_are_not_changed_and_a_second_call_gives_the_same(place: Place, case: Case) -> None:
    given, copies = put(place, case.arguments), put(place, case.arguments)
    agree(place, case, case.run(place, given), case.run(place, given))
    for name, value in given.items():
        for tensor, copy in zip(tensors(value), tensors(copies[name]), strict=True):
            assert_same_bits(tensor, copy)


@each_place
@each_case
def test_an_item_alone_gives_what_it_gives_in_company(place: Place, case: Case) -> None:
    given = put(place, case.arguments)
    together = case.run(place, given)
    for i in range(case.items):
        company = [output[part] for output, part in zip(together, case.part(i), strict=True)]
        agree(place, case, case.run(place, case.alone(given, i)), company)


@each_place
@each_case
def test_nan_stays_in_the_item_that_has_it(place: Place, case: Case) -> None:
    """In the reference's attention it may vanish: torch's kernel takes a score that is NaN for one that is not seen."""
    shows = not (place.backend == "reference" and case.op == "prefix_attention")
    clean = case.run(place, put(place, case.arguments))
    for i in (0, case.items // 2, case.items - 1):
        given = put(place, case.arguments)
        name, index = case.spoil
        given[name][index(i)] = math.nan
        for output, before, part in zip(case.run(place, given), clean, case.part(i), strict=True):
            if not output.is_floating_point():
                continue
            assert output[part].isnan().any() or not output[part].numel() or not shows
            output[part] = before[part]
            assert_agrees(place, output, before, case.tolerance)


@each_place
@each_case
def test_all_of_an_output_is_written_and_nothing_beside_it(place: Place, case: Case) -> None:
    given = put(place, case.arguments)
    new = case.run(place, given)
    assert all(output.isfinite().all() for output in new if output.is_floating_point())
    wide = [with_gaps(torch.full_like(output, math.nan)) for output, _ in zip(new, case.outs, strict=False)]
    outs = dict(zip(case.outs, wide, strict=True))
    written = case.run(place, given | outs)
    for output, array in zip(written, wide, strict=False):
        assert output is array
        behind = array.as_strided((len(array), 8), (array.stride(0), 1), array[0].numel())
        assert behind.isnan().all()
    agree_elsewhere(place, case, written, new)


@each_place
@each_aliased
def test_an_output_may_be_an_input(place: Place, case: Case, taken: dict[str, str]) -> None:
    expected = case.run(place, put(place, case.arguments))
    given = put(place, case.arguments)
    outs = {out: given[name] for out, name in taken.items()}
    got = case.run(place, given | outs)
    assert all(output is outs[out] for output, out in zip(got, case.outs, strict=True))
    agree(place, case, got, expected)


@each_place
@each_case
def test_rows_of_inputs_may_lie_apart(place: Place, case: Case) -> None:
    given = put(place, case.arguments)
    expected = case.run(place, given)
    apart = {name: map_tensors(with_gaps, given[name]) for name in case.apart}
    agree_elsewhere(place, case, case.run(place, given | apart), expected)
