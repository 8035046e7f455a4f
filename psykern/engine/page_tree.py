"""Which rows of a store hold which tokens: pages of rows as a prefix tree. Bookkeeping alone; ``pages`` has the rows.

A page holds a run of tokens that follow each other, in its rows, in order. It hangs below another page, behind some
token of it, which need not be the last: so no page is ever split or copied, and what begins alike shares pages whoever
it belongs to. The page of a run's end is extended where it is while it has rows left; what goes another way opens a
page of its own.

Pages that were not used for longest are given up first, the ends of paths before what they hang on. What is used since
the last :meth:`PageTree.tick` stays.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np

from psykern.engine.plan import Past

PAGE_TOKENS = 64
_WIDTH = np.dtype(np.int32).itemsize  # bytes of a token: runs are compared as bytes


@dataclass(slots=True, eq=False)
class _Page:
    number: int  # its rows begin at number * page_tokens
    tokens: bytes  # int32
    parent: _Page | None  # None: the root, which has no rows
    key: tuple[int, bytes]  # where it hangs: bytes of the parent before it, and its first token
    used: int  # tick
    children: dict[tuple[int, bytes], _Page] = field(default_factory=dict)


class PageTree:
    """See the module. Not for several threads at once."""

    def __init__(self, num_pages: int, page_tokens: int = PAGE_TOKENS) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._now = 0
        self.clear()

    @property
    def num_free(self) -> int:
        """Pages."""
        return len(self._free)

    def clear(self) -> None:
        """Gives up every page."""
        self._root = _Page(-1, b"", None, (0, b""), 0)
        self._free = list(range(self.num_pages))[::-1]  # so that the first are taken first, and rows lie together
        self._held: dict[int, _Page] = {}  # by number
        self._promised = 0  # free pages that :meth:`make_room` answered for since the last tick

    def tick(self) -> None:
        """Pages that are used from here on stay until the next tick."""
        self._now += 1
        self._promised = 0

    def match(self, token_ids: np.ndarray) -> Past:
        """The longest beginning of ``token_ids`` [T] int32 that is held, and its rows."""
        path = self._walk(token_ids.tobytes())
        ranges: list[tuple[int, int]] = []
        for page, size in path[1:]:
            begin = page.number * self.page_tokens
            end = begin + size // _WIDTH
            if ranges and ranges[-1][1] == begin:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((begin, end))
        return Past(sum(end - begin for begin, end in ranges), tuple(ranges))

    def pages_of(self, num_tokens: int) -> int:
        """That so many tokens need at most."""
        return -(-num_tokens // self.page_tokens)

    def make_room(self, num_tokens: int) -> bool:
        """Whether an :meth:`insert` of so many new tokens will find rows, beside all that was promised since the last
        tick. Gives up pages for it, none where that would not be enough."""
        needed = self._promised + self.pages_of(num_tokens)
        if len(self._free) < needed and not self._give_up(needed):
            return False
        self._promised = needed
        return True

    def insert(self, token_ids: np.ndarray) -> np.ndarray:
        """Rows for the last tokens of ``token_ids``, for as many as are not held yet, [n] int64: to be filled at once.
        Room for them must have been made."""
        data = token_ids.tobytes()
        path = self._walk(data)
        page, at = path[-1][0], sum(size for _, size in path)
        rows = []
        if path[-1][1] < len(page.tokens):  # it parts in the middle of the page
            page = self._open(page, path[-1][1], data[at : at + _WIDTH]) if at < len(data) else page
        while at < len(data):
            room = self.page_tokens * _WIDTH - len(page.tokens)
            if page.parent is None or room == 0:
                page = self._open(page, len(page.tokens), data[at : at + _WIDTH])
                continue
            more = data[at : at + room]
            first = page.number * self.page_tokens + len(page.tokens) // _WIDTH
            rows.append(np.arange(first, first + len(more) // _WIDTH))
            page.tokens += more
            at += len(more)
        return np.concatenate(rows) if rows else np.empty(0, np.int64)

    def _walk(self, data: bytes) -> list[tuple[_Page, int]]:
        """The pages of the longest held beginning of ``data``, the root first, and how many bytes of each it takes."""
        page: _Page | None = self._root
        path: list[tuple[_Page, int]] = []
        at = 0
        while page is not None:
            size = _common(page.tokens, data[at : at + len(page.tokens)])
            at += size
            page.used = self._now
            path.append((page, size))
            page = page.children.get((size, data[at : at + _WIDTH]))
        return path

    def _open(self, parent: _Page, size: int, token: bytes) -> _Page:
        page = _Page(self._free.pop(), b"", parent, (size, token), self._now)
        parent.children[page.key] = self._held[page.number] = page
        return page

    def _give_up(self, needed: int) -> bool:
        """Pages until so many are free; False: there are not so many. A page was used whenever one below it was."""
        idle = [page for page in self._held.values() if page.used < self._now]
        if len(self._free) + len(idle) < needed:
            return False
        ends = [(page.used, page.number) for page in idle if not page.children]
        heapq.heapify(ends)
        while len(self._free) < needed:
            page = self._held.pop(heapq.heappop(ends)[1])
            parent = page.parent
            assert parent is not None
            del parent.children[page.key]
            self._free.append(page.number)
            if parent is not self._root and not parent.children:  # then a path goes before another is begun
                heapq.heappush(ends, (parent.used, parent.number))
        return True


def _common(one: bytes, two: bytes) -> int:
    """Bytes of the tokens that both begin with."""
    if one == two:
        return len(one)
    size = min(len(one), len(two))
    differs = np.frombuffer(one[:size], np.int32) != np.frombuffer(two[:size], np.int32)
    return int(differs.argmax()) * _WIDTH if differs.any() else size
