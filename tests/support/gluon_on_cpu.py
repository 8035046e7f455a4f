"""Runs the kernels of ``hopper_attention`` and ``overlap_attention`` on a CPU: their own source, with Gluon's words
standing for what they mean.

A partition of warps is a thread. Barriers have true phases, so that a wrong count or parity is a deadlock (an error
after some seconds) or a race. What is asynchronous takes place as late as it may: a product reads its buffers when it
is waited for, and a buffer that is being fetched holds no numbers until its barrier opens.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.language import constexpr

from psykern.kernels.triton import hopper_attention, hopper_kernel, overlap_attention, overlap_kernel

PATIENCE = 20.0  # seconds, of a barrier
_own = threading.local()  # program: its index; products: those not waited for


class Pointer:
    def __init__(self, x: Tensor, place: Any = 0) -> None:
        self.flat, self.place = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0), place
        self.place = self.place + x.storage_offset()
        self.dtype = SimpleNamespace(element_ty=x.dtype)

    def __add__(self, places: Any) -> Pointer:
        other = object.__new__(Pointer)
        other.flat, other.place, other.dtype = self.flat, self.place + places, self.dtype
        return other


class Barrier:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.pending = self.phase = 0

    def arrive(self, count: int = 1) -> None:
        with self.changed:
            self.pending -= count
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == 0:
                self.phase, self.pending = self.phase ^ 1, self.count
                self.changed.notify_all()

    def wait(self, parity: Any) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase != int(parity), PATIENCE), "a barrier never opened"


class Shared:
    """A buffer, or a view of one."""

    def __init__(self, data: Any) -> None:
        self.data = data

    @property
    def shape(self) -> Sequence[int]:
        return [len(self.data), 1] if isinstance(self.data, list) else self.data.shape

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    def index(self, i: Any) -> Any:
        return self.data[int(i)] if isinstance(self.data, list) else Shared(self.data[int(i)])

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.data[start : start + length])

    def permute(self, order: tuple[int, int]) -> Shared:
        return Shared(self.data.permute(order))

    def load(self, layout: object) -> Tensor:
        return self.data.clone()

    def store(self, x: Tensor) -> None:
        self.data.copy_(x)


class Descriptor:
    def __init__(self, x: Tensor, rows: int, columns: int) -> None:
        self.x, self.rows, self.columns, self.dtype, self.layout = x, rows, columns, x.dtype, None


def _load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Tensor:
    places = torch.as_tensor(pointer.place)
    mask = torch.as_tensor(mask).expand(torch.broadcast_shapes(places.shape, torch.as_tensor(mask).shape))
    safe = torch.where(mask, places, 0)
    found = pointer.flat[safe.long()]
    return torch.where(mask, found, torch.as_tensor(other, dtype=found.dtype))


def _store(pointer: Pointer, x: Tensor, mask: Tensor) -> None:
    mask = mask.expand(x.shape)
    pointer.flat[pointer.place.expand(x.shape)[mask].long()] = x[mask]


def _copy(source: Descriptor, place: Sequence[Any], barrier: Barrier, target: Shared, pred: Any = True) -> None:
    if not pred:
        return
    target.data.fill_(math.nan)
    row, column = int(place[0]), int(place[1])

    def land() -> None:
        inside = torch.zeros(source.rows, source.columns, dtype=source.x.dtype)
        begin, end = max(row, 0), min(row + source.rows, len(source.x))
        inside[begin - row : end - row] = source.x[begin:end, column : column + source.columns]
        target.data.copy_(inside)
        barrier.arrive()

    threading.Timer(0.0005, land).start()


class Product:
    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc, self.result = a, b, acc, use_acc, None

    def value(self) -> Tensor:
        if self.result is None:
            a = self.a.data if isinstance(self.a, Shared) else self.a
            acc = self.acc.value() if isinstance(self.acc, Product) else self.acc
            self.result = a.float() @ self.b.data.float() + (acc if self.use_acc else 0)
        return self.result


def _multiply(a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    product = Product(a, b, acc, use_acc)
    if not is_async:
        return product.value()
    _own.products.append(product)
    return product


def _wait(num_outstanding: int, deps: Sequence[Any]) -> Any:
    """What is still outstanding stays a ``Product``: nothing can be computed with it."""
    while len(_own.products) > num_outstanding:
        _own.products.pop(0).value()
    done = [d.result if isinstance(d, Product) and d.result is not None else d for d in deps]
    return done[0] if len(done) == 1 else tuple(done)


def _specialize(parts: Sequence[tuple[Any, tuple[Any, ...]]], warps: Sequence[int], registers: Sequence[int]) -> None:
    errors: list[BaseException] = []
    program = _own.program

    def run(part: Any, arguments: tuple[Any, ...]) -> None:
        _own.program, _own.products = program, []
        try:
            part(*arguments)
            assert not _own.products, "a product was not waited for"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _allocate(dtype: Any, shape: Sequence[int], layout: object) -> Any:
    if dtype is torch.int64:
        return Shared([Barrier() for _ in range(shape[0])])
    return Shared(torch.full(tuple(shape), math.nan, dtype=dtype))


def _both(op: Any) -> Any:
    return lambda a, b: op(torch.as_tensor(a), torch.as_tensor(b))


def _arrive(barrier: Barrier, count: int) -> None:
    barrier.arrive(count)
    if _own.products:
        time.sleep(0.002)  # a buffer released while a product still reads it is overwritten meanwhile


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


def gluon(programs: int) -> SimpleNamespace:
    words: dict[str, Any] = {
        "constexpr": lambda x: x,
        "int32": torch.int32,
        "int64": torch.int64,
        "float32": torch.float32,
        "load": _load,
        "store": _store,
        "where": lambda c, a, b: torch.where(torch.as_tensor(c), a, b),
        "minimum": _both(torch.minimum),
        "maximum": _both(torch.maximum),
        "max": lambda x, axis: x.amax(axis),
        "sum": lambda x, axis: x.sum(axis),
        "exp2": torch.exp2,
        "cdiv": lambda a, b: -(-a // b),
        "arange": lambda a, b, layout: torch.arange(a, b),
        "zeros": lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        "full": lambda shape, x, dtype, layout: torch.full(shape, x, dtype=dtype),
        "full_like": torch.full_like,
        "zeros_like": torch.zeros_like,
        "to_tensor": lambda x: x,
        "expand_dims": lambda x, axis: x.unsqueeze(axis),
        "convert_layout": lambda x, layout: x,
        "num_programs": lambda axis: programs,
        "program_id": lambda axis: _own.program,
        "static_range": range,
        "allocate_shared_memory": _allocate,
        "warp_specialize": _specialize,
    }
    layouts = ("NVMMASharedLayout", "NVMMADistributedLayout", "DotOperandLayout", "BlockedLayout", "SliceLayout")
    return SimpleNamespace(**words, **{name: MagicMock() for name in layouts})


def words_of(module: ModuleType) -> dict[str, Any]:
    """What the names in a kernel's module stand for."""
    words = {n: f.fn for n, f in vars(module).items() if isinstance(f, GluonJITFunction)}
    words |= {n: x.value for n, x in vars(module).items() if isinstance(x, constexpr)}
    known = {
        "product_layout": MagicMock(),
        "rows_layout": MagicMock(),
        "mbarrier": SimpleNamespace(
            MBarrierLayout=MagicMock(),
            init=_init,
            wait=lambda barrier, phase, pred=True: barrier.wait(phase) if pred else None,
            arrive=_arrive,
            expect=lambda barrier, size, pred=True: None,  # its arrival is the copy's
        ),
        "fetch": _copy,
        "warpgroup_mma": _multiply,
        "warpgroup_mma_wait": _wait,
        "fence_async_shared": lambda: None,
        "meet": lambda: None,
        "leave": lambda: None,
    }
    return words | {name: word for name, word in known.items() if hasattr(module, name)}


class Launcher:
    """Stands for ``attention_kernel`` of a module and runs it, program by program."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*arguments: Any, num_warps: int, **options: Any) -> None:
            values = [Pointer(a) if isinstance(a, Tensor) else a for a in arguments]
            words = {m: words_of(m) | {"gl": gluon(grid[0])} for m in (hopper_kernel, overlap_kernel)}
            with ExitStack() as stack:
                for module, names in words.items():
                    for name, value in names.items():
                        stack.enter_context(patch.object(module, name, value))
                for _own.program in range(grid[0]):
                    _own.products = []
                    self.module.attention_kernel(*values, **options)
                    assert not _own.products, "a product was not waited for"

        return launch


@contextmanager
def on_cpu(processors: int) -> Iterator[None]:
    """Both operations with their kernels run on the CPU, as by a GPU of so many multiprocessors."""
    descriptor = lambda x, head_dim: Descriptor(x, 128, head_dim)  # noqa: E731
    with (
        patch.object(hopper_attention, "attention_kernel", Launcher(hopper_kernel)),
        patch.object(overlap_attention, "attention_kernel", Launcher(overlap_kernel)),
        patch.object(hopper_attention, "_descriptor", descriptor),
        patch.object(overlap_attention, "_descriptor", descriptor),
        patch.object(hopper_attention, "_num_processors", lambda device: processors),
        patch.object(overlap_attention, "_num_processors", lambda device: processors),
    ):
        yield
