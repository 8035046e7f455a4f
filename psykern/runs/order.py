"""The data's order of a run's records.

Units are cut along the order of texts (``data.units``), so parts of one group hold what lies among each other in the
data. Each of them says in its schema's metadata where its transcripts belong; parts without that follow each other.
Whoever reads a run puts its batches through :func:`in_order`, in the order of the parts' names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import pyarrow as pa

from psykern.core.errors import RunFolderError

_METADATA = b"psykern order"
_BATCH_ROWS = 2**16  # about so many of a group are put together at a time


@dataclass(frozen=True, slots=True)
class PartOrder:
    """Where the transcripts of one part belong among those of its group."""

    group: int  # number of the group's first unit
    places: Sequence[int]  # [transcripts] ascending
    counts: Sequence[int]  # [transcripts] records of each

    def metadata(self) -> dict[bytes, bytes]:
        """What a part's schema holds for :func:`in_order`."""
        return {_METADATA: json.dumps([self.group, self.places, self.counts]).encode()}


def in_order(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches of all parts, which have their parts' metadata, in the order of the data. A group is in memory at a
    time. Raises RunFolderError where a part's metadata do not fit its records."""
    waiting: list[tuple[PartOrder, pa.Table]] = []
    for metadata, own in groupby(batches, key=lambda batch: (batch.schema.metadata or {}).get(_METADATA)):
        order = None if metadata is None else PartOrder(*json.loads(metadata))
        if waiting and (order is None or order.group != waiting[0][0].group):
            yield from _merged(waiting)
            waiting = []
        if order is None:
            yield from own
        else:
            table = pa.Table.from_batches([batch.replace_schema_metadata(None) for batch in own])
            if sum(order.counts) != table.num_rows:
                raise RunFolderError(
                    f"a part of the units from {order.group} on: expected {sum(order.counts):,} records by its "
                    f"metadata, got {table.num_rows:,}; copy the run anew"
                )
            waiting.append((order, table))
    yield from _merged(waiting)


def _merged(parts: Sequence[tuple[PartOrder, pa.Table]]) -> Iterator[pa.RecordBatch]:
    """The records of a group, by the places of their transcripts."""
    runs = sorted(
        (place, part, start, count)
        for part, (order, _) in enumerate(parts)
        for place, start, count in zip(
            order.places, list(accumulate(order.counts, initial=0))[:-1], order.counts, strict=True
        )
    )
    pieces: list[pa.Table] = []
    num_rows = 0
    for number, (_, part, start, count) in enumerate(runs, start=1):
        pieces.append(parts[part][1].slice(start, count))
        num_rows += count
        if num_rows >= _BATCH_ROWS or number == len(runs):
            yield from pa.concat_tables(pieces).combine_chunks().to_batches()
            pieces, num_rows = [], 0
