"""Triton's interpreter without what it does anew, to no end, at each call of a function of a kernel.

It puts its own functions in the place of all builtins of ``triton.language``: before each launch and, inside of it,
before each call of a jitted function, when they are in place already. Half of its time went into looking through all
that these modules hold. Which of that are builtins never changes, so it is looked up once; the rest is Triton's own.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import SimpleNamespace
from typing import Any


def look_up_builtins_once() -> None:
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @cache
    def builtins(package: Any) -> list[str]:
        """By name: those of a package that nothing was put into yet."""
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def getmembers(package: Any) -> list[tuple[str, Any]]:
        return [(name, getattr(package, name)) for name in builtins(package)]

    interpreter.inspect = SimpleNamespace(**vars(inspect) | {"getmembers": getmembers})
