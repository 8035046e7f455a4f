"""The loops in registers that products are measured against."""

from __future__ import annotations

import re

import pytest

from psykern import _cpu

# By hand: 16,384 steps of 24 or 12 multiply-adds of a vector; of bf16 twice the numbers, with tiles 1,024 steps of four
# products of 16 x 32 and 32 x 16 numbers.
FP32 = {"avx2": 2 * 16_384 * 12 * 8} | dict.fromkeys(("avx512", "avx512_bf16", "amx"), 2 * 16_384 * 24 * 16)
BF16 = {"avx512_bf16": 2 * 16_384 * 24 * 32, "amx": 2 * 1024 * 4 * 16 * 16 * 32}


@pytest.mark.parametrize("isa", _cpu.instruction_sets())
@pytest.mark.parametrize("threads", [1, 2])
def test_operations_are_those_of_the_set(isa: str, threads: int) -> None:
    operations = {dtype: _cpu.peak(dtype, 3, num_threads=threads, isa=isa) for dtype in ("float32", "bfloat16")}
    assert operations["bfloat16"] == 3 * BF16.get(isa, 0)
    assert operations["float32"] == 3 * FP32.get(isa, operations["float32"] / 3)
    assert _cpu.peak("float32", 0, num_threads=threads, isa=isa) == 0.0


def test_what_is_no_such_dtype_or_set_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("dtype: expected float32 or bfloat16, got float16")):
        _cpu.peak("float16", 1, num_threads=1)
    with pytest.raises(ValueError, match=re.escape("num_threads: expected at least 1, got 0")):
        _cpu.peak("float32", 1, num_threads=0)
