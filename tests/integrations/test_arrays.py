"""Arrays of other libraries through DLPack: NumPy for real, JAX where it is installed, and a stand-in for what CuPy is,
a library of its own that torch and NumPy know nothing of. Expected is what tensors of the same numbers give."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.calls import OPS, arguments
from support.ops import map_tensors
from torch import Tensor

from psykern import kernels
from psykern.integrations import arrays


def outputs(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (list, tuple)) else [result]


@pytest.mark.parametrize("op", OPS)
def test_numpy_arrays_give_numpy_arrays_of_the_same_numbers(op: str) -> None:
    given = {name: map_tensors(lambda x: x.numpy(), value) for name, value in arguments(op).items()}
    given |= {name: value for name, value in arguments(op).items() if name in ("routes", "segments")}
    expected = getattr(kernels, op)(**arguments(op))
    result = arrays.call(getattr(kernels, op), **given)
    assert type(result) is type(expected) or isinstance(expected, Tensor)
    for array, tensor in zip(outputs(result), outputs(expected), strict=True):
        assert type(array) is np.ndarray
        np.testing.assert_array_equal(array, tensor.numpy())


def test_memory_is_shared_and_an_array_that_was_written_to_comes_back() -> None:
    rows = np.array([4, 0, 4])
    source, wide = np.random.default_rng(0).random((2, 5, 4)), np.zeros((2, 3, 8))
    out = wide[:, :, :4]  # whose rows lie apart
    assert arrays.to_tensor(source).data_ptr() == source.ctypes.data
    assert arrays.call(kernels.gather_rows, source, rows, out=out) is out
    np.testing.assert_array_equal(wide, np.concatenate([source[:, rows], np.zeros((2, 3, 4))], axis=2))
    tensor = torch.ones(3)
    assert arrays.from_tensor(tensor, source).ctypes.data == tensor.data_ptr()


def test_read_only_and_turned_arrays_are_taken_and_are_no_place_to_write_to() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = arrays.call(kernels.silu_mul, x[::-1].copy(), x)
    frozen = x.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(arrays.call(kernels.silu_mul, x[::-1], frozen), expected)
    np.testing.assert_array_equal(x, frozen)
    with pytest.raises(ValueError, match=r"out: expected an array that can be written to, got a read-only numpy\.nd"):
        arrays.call(kernels.silu_mul, x, x, out=frozen)
    with pytest.raises(ValueError, match="out: expected an array to write to without negative strides"):
        arrays.call(kernels.silu_mul, x, x, out=x[::-1])


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones((3, 4), ">f4"), r"up: expected an array that DLPack can hand over, got numpy.ndarray of >f4"),
        (np.full((3, 4), "a"), r"up: expected an array that DLPack can hand over, got numpy.ndarray of <U1"),
        (np.ma.masked_less(np.ones((3, 4), np.float32), 2), "up: expected an array without a mask"),
    ],
    ids=["byte order", "text", "mask"],
)
def test_what_cannot_be_handed_over_is_refused_by_name(array: np.ndarray, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        arrays.call(kernels.silu_mul, np.ones((3, 4), np.float32), array)


def test_bfloat16_of_ml_dtypes_is_taken_and_given() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="NumPy has bfloat16 by ml_dtypes alone")
    x = np.arange(12).reshape(3, 4).astype(ml_dtypes.bfloat16)
    result = arrays.call(kernels.silu_mul, x, x)
    assert result.dtype == x.dtype
    tensor = torch.arange(12).view(3, 4).bfloat16()
    np.testing.assert_array_equal(result.astype(np.float32), kernels.silu_mul(tensor, tensor).float().numpy())


class Foreign:
    """An array of a library that has DLPack and little else; ``from_dlpack`` is its library's."""

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.held.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self.held.__dlpack_device__()

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(from_dlpack=lambda array: Foreign(torch.from_dlpack(array)))


def test_results_are_of_the_library_of_the_first_array() -> None:
    given = arguments("option_logprobs")
    expected = kernels.option_logprobs(**given)
    hidden = Foreign(given["hidden"].to(torch.bfloat16).float())
    mixed = {name: value.numpy() for name, value in given.items() if name != "hidden"}
    result = arrays.call(kernels.option_logprobs, hidden, **mixed)
    assert isinstance(result, kernels.OptionLogprobs)
    assert all(isinstance(array, Foreign) for array in result)
    assert all(torch.equal(array.held, tensor) for array, tensor in zip(result, expected, strict=True))
    assert arrays.to_tensor(hidden).data_ptr() == hidden.held.data_ptr()


def test_segments_are_made_of_arrays_too() -> None:
    counts = [np.array(x, np.int32) for x in ([0, 1, 2], [0, 3], [0, 1], [[0, 3]])]
    made = arrays.call(kernels.Segments, *counts)
    q = np.random.default_rng(0).random((3, 2, 8), np.float32)
    result = arrays.call(kernels.prefix_attention, q, q, q, made, softmax_scale=0.5)
    tensor = torch.from_numpy(q)
    expected = kernels.prefix_attention(tensor, tensor, tensor, made, softmax_scale=0.5)
    np.testing.assert_array_equal(result, expected.numpy())


def test_jax_arrays_give_jax_arrays() -> None:
    jax = pytest.importorskip("jax", reason="needs JAX")
    x = jax.numpy.arange(12.0).reshape(3, 4)
    for array in (x, x.astype(jax.numpy.bfloat16)):
        result = arrays.call(kernels.silu_mul, array, array)
        assert isinstance(result, jax.Array) and result.dtype == array.dtype
        np.testing.assert_allclose(result.astype(float), jax.nn.silu(array) * array, rtol=1e-2)
    with pytest.raises(ValueError, match="out: expected an array that can be written to, got a read-only jax"):
        arrays.call(kernels.silu_mul, x, x, out=x)
