"""What a cell of a row may hold: a name, an id, answer options.

The rule: a cell is used as it stands or refused with its column's name and the reason. None and NaN count as missing.

Numbers lose their spelling on the way through a data frame: the integers of a column with a gap become floats, those
of a database decimals. They are written as people write them, so that 7, 7.0 and Decimal("7.00") are all ``7``. What a
row's own responses say goes before that: where they hold a number of the options as it stands (``1.0``, ``2.50``), and
none as people write it, the row's options keep that spelling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import date, time
from decimal import Decimal
from itertools import chain
from typing import TypeGuard
from uuid import UUID

import numpy as np

Number = int | float | Decimal

_KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    Decimal: "a number",
    str: "a string",
    list: "a list",
    tuple: "an object",  # as rows.read takes JSON's objects apart
    dict: "an object",
}


def is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_blank(value: object) -> bool:
    """Whether an id says nothing: a table's empty cell becomes an empty string."""
    return is_missing(value) or (isinstance(value, str) and not value.strip())


def kind(value: object) -> str:
    """A value's type for messages, as JSON calls it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "a number that is not finite"
    return _KINDS.get(type(value), type(value).__name__)


def string(name: str, value: object) -> str:
    """The value if it is a string that UTF-8 can hold; JSON's escapes can spell half of a surrogate pair. Raises
    ValueError, as all functions here do for what they do not take."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a string, got {kind(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = f"U+{ord(value[error.start]):04X}"
            raise ValueError(f"{name}: lone surrogate {code} at character {error.start}, not Unicode text") from error
    return value


def identifier(name: str, value: object, *, missing: str) -> str:
    """The one text of an id: a string, a number, or what parquet holds beside them that has an evident text."""
    if is_missing(value):
        return missing
    if _is_number(value):
        check_exact(name, value)
        return _as_people_write(value)
    if isinstance(value, (date, time)):  # a timestamp is a date too
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, str):
        return string(name, value)
    raise ValueError(f"{name}: expected a string or a number, got {kind(value)}")


def check_exact(name: str, value: Number, *, bits: int = 53) -> None:
    """Refuses a float, of ``bits`` significant ones, from where on two integers can be one float."""
    if isinstance(value, float) and math.isfinite(value) and abs(value) >= 2.0**bits:
        raise ValueError(f"{name}: {value!r} is a float, too large to tell ids apart; write it as string or integer")


def answer_options(value: object, text: str, responses_char: np.ndarray) -> tuple[tuple[str, ...], ...] | None:
    """A tuple for each response of ``text``, from one list for all of them or one list (or null) for each.

    ``responses_char`` [R, 2] int64: where the responses stand.
    """
    if is_missing(value):
        return None
    if not isinstance(value, list):
        raise ValueError(f"options: expected a list, got {kind(value)}")
    responses = [text[first:last] for first, last in responses_char.tolist()]
    write = str if _keeps_spelling(value, responses) else _as_people_write
    per_response = any(isinstance(item, list) for item in value) or (value != [] and all(map(is_missing, value)))
    if not per_response:
        return (_option_list("options", value, write),) * len(responses)
    if len(value) != len(responses):
        raise ValueError(f"options: expected one list for each of {len(responses)} responses, got {len(value)} lists")
    equal: dict[tuple[str, ...], tuple[str, ...]] = {}  # equal lists become one object
    lists = (_option_list(f"options of response {number}", item, write) for number, item in enumerate(value, start=1))
    return tuple(equal.setdefault(options, options) for options in lists)


def _option_list(name: str, value: object, write: Callable[[Number], str]) -> tuple[str, ...]:
    if is_missing(value):
        return ()
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list or null, got {kind(value)}")
    options: dict[str, None] = {}  # an ordered set
    for number, item in enumerate(value, start=1):
        if is_missing(item):
            raise ValueError(f"{name}: option {number}: expected a string, got {kind(item)}; no list may be padded")
        option = write(item) if _is_number(item) else string(f"{name}: option {number}", item)
        if not option:
            raise ValueError(f"{name}: option {number} is empty")
        if option in options:
            raise ValueError(f"{name}: option {number} repeats {option!r}")
        options[option] = None
    return tuple(options)


def _keeps_spelling(options: list[object], responses: Sequence[str]) -> bool:
    """Whether the responses hold one of the numbers as it stands, and none as people write it."""
    flat = chain.from_iterable(item if isinstance(item, list) else [item] for item in options)
    numbers = [item for item in flat if isinstance(item, (float, Decimal)) and math.isfinite(item)]
    changed = [item for item in numbers if str(item) != _as_people_write(item)]
    if not changed:
        return False
    said = {response.strip() for response in responses}
    return any(str(item) in said for item in changed) and not any(_as_people_write(item) in said for item in changed)


def _is_number(value: object) -> TypeGuard[Number]:
    if isinstance(value, int):  # of any size
        return not isinstance(value, bool)
    return isinstance(value, (float, Decimal)) and math.isfinite(value)


def _as_people_write(number: Number) -> str:
    if isinstance(number, int):
        return str(number)
    if number == int(number):
        return str(int(number))
    return str(number) if isinstance(number, float) else f"{number:f}".rstrip("0")
