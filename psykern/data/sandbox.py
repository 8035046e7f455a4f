"""The sandbox that chat templates run in: that of ``transformers``, without its clock and without chance.

The rule: equal templates, turns and special tokens give equal text, on any day and any machine. ``strftime_now`` tells
midnight of the run's date, in English whatever the process's locale; the filter ``random`` and the function ``lipsum``
are not there.
"""

from __future__ import annotations

import re
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

_MONTHS: tuple[str, ...] = ("January", "February", "March", "April", "May", "June", "July")
_MONTHS += ("August", "September", "October", "November", "December")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def asks_for_date(source: str) -> bool:
    """Whether the template may print the day, on whatever branch."""
    return "strftime_now" in source


@lru_cache(maxsize=8)
def compiled(source: str, date: str | None) -> Any:
    """The template as Jinja's, for a run of ``date`` (YYYY-MM-DD; None: the template does not ask). Raises what Jinja
    raises for a source that is none, or that uses chance."""
    # Private, but the only way to their environment: `apply_chat_template` hands a template no function any more.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    def strftime_now(format: str) -> str:
        return _strftime(date, format)

    sandbox = _compile_jinja_template("").environment.overlay()  # a copy, as theirs serves the whole process
    sandbox.filters = {name: of for name, of in sandbox.filters.items() if name != "random"}
    sandbox.globals = {name: of for name, of in sandbox.globals.items() if name != "lipsum"}
    sandbox.globals["strftime_now"] = strftime_now
    return sandbox.from_string(source)


def _strftime(date: str | None, format: str) -> str:
    """``format`` as C's strftime fills it in at midnight of ``date``, in the locale "C". Raises ValueError for None."""
    if date is None:
        raise ValueError("date: expected the run's, got None")
    moment = datetime.fromisoformat(date)
    month, day = _MONTHS[moment.month - 1], _DAYS[moment.weekday()]
    told = {"B": month, "b": month[:3], "h": month[:3], "A": day, "a": day[:3], "p": "AM", "P": "am"}
    told |= {"c": f"{day[:3]} {month[:3]} %e %H:%M:%S %Y", "x": "%m/%d/%y", "X": "%H:%M:%S", "r": "%I:%M:%S AM"}
    told["s"] = str(int(moment.replace(tzinfo=timezone.utc).timestamp()))  # else by the machine's time zone
    return moment.strftime(re.sub("%(.)", lambda match: told.get(match[1], match[0]), format))
