"""Writes API.md from the docstrings of what is public: ``python tests/support/api_page.py``.

Public is what ``psykern.__all__`` names, the operations of ``psykern.kernels`` and what others use them by, and of
each class the fields and methods without a leading underscore. A field says what its comment says.
``tests/test_api.py`` fails where the page is not what this writes.
"""

from __future__ import annotations

import ast
import enum
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch

import psykern
from psykern import kernels
from psykern.core import settings
from psykern.integrations import arrays
from psykern.kernels import torch_ops
from psykern.scoring import surprisal

_ALIASES = (settings, surprisal)  # that name literal words
PAGE = Path(__file__).resolve().parents[2] / "API.md"

_HEAD = """# The public API

Written by `python tests/support/api_page.py` from the docstrings; do not edit. README says how to begin.
Log-probabilities are in nats.
"""

# The parts of the page, each with the modules whose names it holds, in order.
PARTS = {
    "Scoring in memory": ("scoring.",),
    "Runs: files in, a folder of records out": ("core.settings", "runs."),
    "Comparing runs": ("study.",),
    "Errors": ("core.errors",),
}


def page() -> str:
    parts = [_HEAD]
    for title, homes in PARTS.items():
        parts.append(f"## {title}\n")
        parts += [entry(f"psykern.{name}", getattr(psykern, name)) for home in homes for name in names_of(home)]
    parts.append("## Kernels\n")
    parts.append(paragraphs(inspect.getdoc(kernels) or "") + "\n")
    parts += [entry(f"psykern.kernels.{name}", value) for name, value in operations()]
    parts += ["### Operators of torch\n", paragraphs(inspect.getdoc(torch_ops) or "") + "\n", operators()]
    parts.append("### Arrays of other libraries\n\n" + paragraphs(inspect.getdoc(arrays) or "") + "\n")
    for function in (arrays.call, arrays.to_tensor, arrays.from_tensor):
        parts.append(entry(f"psykern.integrations.arrays.{function.__name__}", function))
    return "\n".join(parts).rstrip() + "\n"


def operators() -> str:
    """What torch is told of each operation, in its notation; what has (a!) or (b!) is written to."""
    defined = [getattr(torch.ops.psykern, name, None) for name, _ in operations()]
    return "```\n" + "\n".join(str(operator.default._schema) for operator in defined if operator) + "\n```\n"


def names_of(home: str) -> list[str]:
    """Public names whose module begins with ``home``: functions first, as they make what the classes are."""
    found = [name for name in psykern.__all__ if module_of(name).startswith(home)]
    return sorted(found, key=lambda name: (inspect.isclass(getattr(psykern, name)), name))


def module_of(name: str) -> str:
    return str(getattr(getattr(psykern, name), "__module__", "")).removeprefix("psykern.")


def operations() -> list[tuple[str, Any]]:
    found = inspect.getmembers(kernels, lambda value: inspect.isfunction(value) or inspect.isclass(value))
    where = (kernels.linear, kernels.Segments, kernels.Routes, kernels.resolve)
    homes = {value.__module__ for value in where}  # not what is imported there to check arguments
    return [(name, value) for name, value in found if not name.startswith("_") and value.__module__ in homes]


def entry(name: str, value: Any) -> str:
    if not inspect.isclass(value):
        return f"### `{name}{signature(value)}`\n\n{paragraphs(inspect.getdoc(value) or '')}\n"
    lines = [f"### class `{name}`\n", paragraphs(inspect.getdoc(value) or "") + "\n"]
    fields = list(fields_of(value))
    if fields:
        lines += ["| field | type | |", "|---|---|---|"]
        lines += [f"| `{field}` | `{cell(kind)}` | {cell(comment)} |" for field, kind, comment in fields] + [""]
    lines += [f"- **`{method}`** {bullet(doc)}" for method, doc in methods_of(value)]
    return "\n".join(lines).rstrip() + "\n"


def fields_of(cls: type) -> Iterator[tuple[str, str, str]]:
    """Name, type and comment of each field that the class itself or its bases declare, in order."""
    if issubclass(cls, enum.Enum | BaseException):
        return
    for base in reversed(cls.__mro__):
        if not base.__module__.startswith("psykern"):
            continue
        source = textwrap.dedent(inspect.getsource(base))
        lines = source.splitlines()
        (body,) = ast.parse(source).body
        assert isinstance(body, ast.ClassDef)
        for node in body.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_":
                kind, comment = ast.unparse(node.annotation), _comment(lines, node)
                if kind.startswith("Annotated["):
                    kind, comment = _annotated(base, node.target.id, kind)
                default = f" = {ast.unparse(node.value)}" if node.value is not None else ""
                yield node.target.id, kind + (default if "field(" not in default else ""), comment


def _comment(lines: list[str], node: ast.AnnAssign) -> str:
    """Behind the field on its last line."""
    tail = lines[(node.end_lineno or 1) - 1].encode()[node.end_col_offset or 0 :].decode()
    return tail.partition("#")[2].strip()


def _annotated(cls: type, name: str, kind: str) -> tuple[str, str]:
    """Of a setting: the type in short, and its help."""
    hint = inspect.get_annotations(cls, eval_str=True)[name]
    short = kind.removeprefix("Annotated[").partition(", About(")[0]
    return words_of(short) or short, hint.__metadata__[0].help


def methods_of(cls: type) -> Iterator[tuple[str, str]]:
    """Signature and docstring of public methods and properties that psykern defines, in the order of the source."""
    for name, value in cls.__dict__.items():
        if name.startswith("_"):
            continue
        if isinstance(value, property) or type(value).__name__ == "cached_property":
            yield name, inspect.getdoc(value) or ""
        elif isinstance(value, classmethod):
            yield f"{name}{signature(value.__func__, method=True)}", inspect.getdoc(value.__func__) or ""
        elif inspect.isfunction(value):
            await_ = "await " if inspect.iscoroutinefunction(value) else ""
            yield f"{await_}{name}{signature(value, method=True)}", inspect.getdoc(value) or ""


def signature(function: Any, *, method: bool = False) -> str:
    """As the source has it, defaults and all, with the words that an alias of psykern's stands for."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    if method:
        del node.args.args[0]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    text = f"({ast.unparse(node.args)}){returns}"
    return re.sub(r"\b[A-Z]\w+\b", lambda match: words_of(match[0]) or match[0], text)


def words_of(alias: str) -> str:
    """``Literal['joint', 'split']`` for Boundary; empty for what is no such alias."""
    literal = next((getattr(module, alias) for module in _ALIASES if hasattr(module, alias)), None)
    return f"Literal{list(get_args(literal))}" if get_origin(literal) is Literal else ""


def paragraphs(doc: str) -> str:
    """Of a docstring: roles of Sphinx become plain code."""
    doc = re.sub(r":\w+:`[.~]*([^`]*)`", r"`\1`", doc)
    return doc.replace("``", "`")


def bullet(doc: str) -> str:
    return "— " + paragraphs(doc).replace("\n", "\n  ")


def cell(text: str) -> str:
    return paragraphs(text).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
