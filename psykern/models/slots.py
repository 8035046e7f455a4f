"""The weights of one decoder layer at a time, packed in slots of the device's memory.

A slot holds one layer, every tensor at a fixed place of one flat array, so that products of one input (of queries, keys
and values; of gate and up) are also one matrix each. Layers of different kinds have layouts of their own; a slot has
room for the largest. With as many slots as layers the weights are resident: each layer is copied once. With fewer they
are streamed: a slot that is no longer computed with takes the layer whose turn is next, so that copying overlaps
computing. A layer travels from the mapped file through pinned memory, filled by a thread of its own, to the slot, on a
stream of its own; the computing stream waits for it, the host does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple
from weakref import finalize

import torch
from torch import Tensor

from psykern.models.parts import Fused, Shapes

_ALIGNMENT = 128  # elements: 256 bytes of bf16, what vendor libraries and 16-byte loads want

# A layer's tensors by their names within it, on the CPU, of any dtype. What changes weights on their way (an adapter
# that is merged, quantised weights) is such a function around another: layers and slots know nothing of it.
ReadLayer = Callable[[int], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of a layer stand in a flat array, and its views of several as one."""

    views: Mapping[str, tuple[int, tuple[int, ...]]]  # first element and shape; stored and fused names
    names: tuple[str, ...]  # of the stored tensors alone
    size: int  # elements

    @classmethod
    def of(cls, shapes: Shapes, fused: Fused) -> Layout:
        """Of the tensors ``shapes``, by their names within a layer (``mlp.up_proj.weight``). ``fused``: products of
        one input, by the name of all as one; their weights lie one behind the other, in this order."""
        views: dict[str, tuple[int, tuple[int, ...]]] = {}
        leaders = {f"{parts[0]}.{kind}": parts for parts in fused.values() for kind in ("weight", "bias")}
        size = 0
        for name in shapes:
            if name in views:
                continue
            module, _, kind = name.rpartition(".")
            members = [f"{part}.{kind}" for part in leaders.get(name, (module,))]
            size += -size % _ALIGNMENT
            for member in members:
                if member not in views:
                    views[member] = (size, shapes[member])
                    size += torch.Size(shapes[member]).numel()
        for whole, parts in fused.items():
            for kind in ("weight", "bias"):
                members = [f"{part}.{kind}" for part in parts]
                if members[0] in views:
                    rows = sum(views[member][1][0] for member in members)
                    views[f"{whole}.{kind}"] = (views[members[0]][0], (rows, *views[members[0]][1][1:]))
        return cls(views, tuple(shapes), size)

    def tensors(self, flat: Tensor) -> dict[str, Tensor]:
        """All views of ``flat`` [size] by name."""
        return {
            name: flat[first : first + torch.Size(shape).numel()].view(shape)
            for name, (first, shape) in self.views.items()
        }


def share_layouts(layers: Iterable[tuple[Shapes, Fused]]) -> list[Layout]:
    """The layout of each layer, of its shapes and what is fused; one and the same for all layers of a kind."""
    known: dict[object, Layout] = {}
    layouts = []
    for shapes, fused in layers:
        kind = (*shapes.items(), None, *fused.items())
        if kind not in known:
            known[kind] = Layout.of(shapes, fused)
        layouts.append(known[kind])
    return layouts


class _Load(NamedTuple):
    slot: int
    tensors: Mapping[str, Tensor]  # views of the slot
    done: Future[torch.cuda.Event | None]  # the copy has been issued; the event is its end


class Slots:
    """Layers in the memory of a device; see the module. Layers are asked for one after the other, round and round."""

    def __init__(
        self,
        read: ReadLayer,
        layouts: Sequence[Layout],
        *,
        num_slots: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """``layouts``: of each layer. ``num_slots``: from 1, where a layer is copied when it is asked for, to the
        number of layers."""
        self._read = read
        self._layouts = layouts
        self._device = device
        self._dtype = dtype
        self._size = max(layout.size for layout in layouts)
        count = min(num_slots, len(layouts))
        self._slots = [torch.empty(self._size, dtype=dtype, device=device) for _ in range(count)]
        self._is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None
        if self._stream is not None:
            for slot in self._slots:  # a copy may be under way when they are freed
                slot.record_stream(self._stream)
        self._staging: list[tuple[Tensor, torch.cuda.Event]] = []
        self._loads: dict[int, _Load] = {}  # by layer
        self._num_loaded = 0
        self._current: int | None = None
        executor = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._executor = executor
        finalize(self, executor.shutdown, wait=False, cancel_futures=True)

    @property
    def is_resident(self) -> bool:
        return len(self._slots) == len(self._layouts)

    def layer(self, index: int) -> Mapping[str, Tensor]:
        """The tensors of layer ``index``. Those of the layer before must not be used any more, unless all stay."""
        if index != self._current:
            self._advance(index)
        load = self._loads[index]
        event = load.done.result()  # the copy has been issued
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
        return load.tensors

    def _advance(self, index: int) -> None:
        """Frees the slot of the layer that was computed last and fills what is free with the layers to come."""
        self._current = index
        if self.is_resident and self._loads:
            return
        upcoming = [(index + i) % len(self._layouts) for i in range(len(self._slots))]
        taken = {load.slot for load in self._loads.values()}
        free = [slot for slot in range(len(self._slots)) if slot not in taken]
        for layer in [layer for layer in self._loads if layer not in upcoming]:
            load = self._loads.pop(layer)
            load.done.result()
            free.append(load.slot)
        computed = self._record() if free else None
        for layer in upcoming:
            if layer not in self._loads and free:
                slot = free.pop(0)
                tensors = self._layouts[layer].tensors(self._slots[slot])
                self._loads[layer] = _Load(slot, tensors, self._executor.submit(self._load, layer, slot, computed))

    def _record(self) -> torch.cuda.Event | None:
        """The moment at which everything that was issued so far is computed."""
        return torch.cuda.current_stream(self._device).record_event() if self._is_cuda else None

    def _load(self, layer: int, slot: int, free: torch.cuda.Event | None) -> torch.cuda.Event | None:
        """In the thread: layer ``layer`` into ``slot``, once ``free`` has passed."""
        with torch.inference_mode():
            layout, tensors = self._layouts[layer], self._read(layer)
            if self._stream is None:
                _fill(layout, self._slots[slot], tensors)
                return None
            staging, sent = self._next_staging()
            sent.synchronize()
            _fill(layout, staging, tensors)
            with torch.cuda.stream(self._stream):
                if free is not None:
                    self._stream.wait_event(free)
                self._slots[slot][: layout.size].copy_(staging[: layout.size], non_blocking=True)
                sent.record(self._stream)
                loaded = self._stream.record_event()
            self._num_loaded += 1
            if self.is_resident and self._num_loaded == len(self._layouts):
                sent.synchronize()
                self._staging.clear()
            return loaded

    def _next_staging(self) -> tuple[Tensor, torch.cuda.Event]:
        """One of two pinned arrays, in turn: one is filled while the other is sent."""
        if len(self._staging) < 2:
            pinned = torch.empty(self._size, dtype=self._dtype, pin_memory=True)
            self._staging.append((pinned, torch.cuda.Event()))
            return self._staging[-1]
        self._staging.reverse()
        return self._staging[-1]


def _fill(layout: Layout, flat: Tensor, tensors: Mapping[str, Tensor]) -> None:
    target = layout.tensors(flat)
    for name in layout.names:
        target[name].copy_(tensors[name])


def free_bytes(device: torch.device) -> int | None:
    """Of the device's memory, what torch keeps for what comes included; None: unknown."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None  # not Linux: the allocator will say
