"""Who may import whom: DESIGN.md's module table, checked by reading the source.

A module may import what its row of ``ALLOWED`` names and nothing else of psykern. A row for a package holds for its
submodules, and an allowed package allows its submodules; the row ``demo.train`` goes before the row ``demo``.
``psykern`` stands for the public API: a name that ``psykern/__init__.py`` defines, not a module below it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

_BELOW_SCORE = {
    "core",
    "transcripts",
    "protocol",
    "persona",
    "chat",
    "encode",
    "plan",
    "kernels",
    "checkpoint",
    "model",
    "engine",
    "pipeline",
}
ALLOWED: dict[str, set[str]] = {
    "version": set(),
    "core": set(),
    "persona": set(),
    "transcripts": {"core", "persona"},
    "protocol": {"core"},
    "chat": {"core", "protocol"},
    "encode": {"core", "protocol", "chat", "persona"},
    "plan": {"core", "_cpu"},
    "_cpu": set(),
    "_cuda": set(),
    "kernels": {"kernels", "_cpu", "_cuda"},
    "checkpoint": {"core"},
    "weights": set(),
    "model": {"core", "kernels", "checkpoint", "weights"},
    "pipeline": set(),
    "engine": {"core", "plan", "model", "kernels", "pipeline", "weights"},
    "storage": {"core"},
    "units": {"core", "transcripts"},
    "token_cache": {"core", "storage"},
    "feed": {"core", "encode", "pipeline", "token_cache", "transcripts", "units"},
    "records": {"core", "storage"},
    "metrics": {"core"},
    "progress": set(),
    "score": _BELOW_SCORE | {"feed", "storage", "token_cache", "records", "metrics", "progress", "version"},
    "cluster": {"core", "engine", "kernels", "pipeline", "progress", "records", "score", "storage"},
    "demo": set(),
    "demo.train": {"demo"},
    "demo.posttrain": {"demo"},
    "runs": {"core"},
    "study_models": {"core"},
    "pairing": {"core", "runs", "study_models"},
    "compare": {"core", "runs", "study_models", "pairing", "metrics"},
    "figures": {"core", "study_models", "compare", "metrics"},
    "report": {"core", "study_models", "compare", "metrics", "figures", "version"},
    "session": {"core", "plan", "model", "engine", "kernels", "encode", "protocol", "checkpoint"},
    "integrations": {"psykern", "integrations"},
    "cli": {"psykern", "demo"},
    "__main__": {"cli"},
    "psykern": _BELOW_SCORE
    | {"records", "metrics", "score", "cluster", "session", "compare", "report", "study_models", "version"},
}


def module_name(path: Path, root: Path) -> str:
    """``kernels.cpu`` for psykern/kernels/cpu.py, ``psykern`` for the package itself."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(part for part in parts[1:] if part != "__init__") or "psykern"


def public_names(root: Path) -> set[str]:
    """What psykern/__init__.py defines or imports by name."""
    init = root / "psykern" / "__init__.py"
    names: set[str] = set()
    for node in ast.parse(init.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return names


def absolute(node: ast.ImportFrom, path: Path, root: Path) -> str:
    """The module that ``from … import`` names, with leading dots resolved."""
    if node.level == 0:
        return node.module or ""
    package = path.relative_to(root).parent.parts
    return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


def imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, also inside functions and for type checking only, or that
    it reaches through ``import psykern``."""
    public = public_names(root)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = absolute(node, path, root)
            for alias in node.names:
                yield node.lineno, source if source != "psykern" or alias.name in public else f"psykern.{alias.name}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "psykern":
            yield node.lineno, "psykern" if node.attr in public else f"psykern.{node.attr}"


def is_within(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def violations(path: Path, root: Path) -> list[str]:
    """What a file imports against the table, one message each."""
    module = module_name(path, root)
    row = module
    while row not in ALLOWED and "." in row:
        row = row.rpartition(".")[0]
    if row not in ALLOWED:
        return [f"{module}: not in the table of tests/test_imports.py; add a row that says what it may import"]
    found = []
    for line, name in imports(path, root):
        top, _, rest = name.partition(".")
        if top in {"tests", "benchmarks"}:
            found.append(f"{module}, line {line}: imports {name}, which is not part of the package")
        elif top == "psykern" and not is_within(rest or "psykern", ALLOWED[row]):
            allowed = ", ".join(sorted(ALLOWED[row])) or "nothing"
            found.append(f"{module}, line {line}: imports {name}; of psykern it may import {allowed}")
    return found


SOURCES = sorted([*(ROOT / "psykern").rglob("*.py"), *(ROOT / "psykern").rglob("*.pyi")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "psykern")))
def test_module_imports_only_what_the_table_allows(path: Path) -> None:
    assert violations(path, ROOT) == []


def plant(root: Path, file: str, text: str) -> Path:
    path = root / "psykern" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("file", "text", "imported"),
    [
        ("engine.py", "from psykern.encode import Encoder", "psykern.encode"),
        ("engine.py", "import psykern.encode", "psykern.encode"),
        ("engine.py", "import psykern", "psykern"),
        ("engine.py", "from psykern import score", "psykern"),
        ("engine.py", "from . import encode", "psykern.encode"),
        ("engine.py", "from .encode import Encoder", "psykern.encode"),
        ("engine.py", "def f():\n    from psykern import encode", "psykern.encode"),
        ("kernels/__init__.py", "from psykern.core import Wave", "psykern.core"),
        ("kernels/triton/rope.py", "from ...core import Wave", "psykern.core"),
        ("kernels/triton/rope.py", "from ..core import Wave", None),  # that is psykern.kernels.core
        ("kernels/triton/rope.py", "from psykern.kernels import reference\nfrom psykern import _cuda", None),
        ("demo/train.py", "from psykern.demo import SAMPLE", None),
        ("demo/sample.py", "from psykern.demo import SAMPLE", "psykern.demo"),
        ("cli.py", "from psykern import score, DataError", None),  # the function, although a module has that name
        ("cli.py", "from psykern import engine", "psykern.engine"),
        ("cli.py", "import psykern\npsykern.score()\npsykern.demo.MODEL", None),
        ("cli.py", "import psykern\npsykern.engine.run()", "psykern.engine"),
        ("cli.py", "from psykern.score import score", "psykern.score"),
        ("model.py", "from psykern.kernels_old import rope", "psykern.kernels_old"),
        ("model.py", "from tests.conftest import shared", "tests.conftest"),
        ("model.py", "import benchmarks", "benchmarks"),
        ("model.py", "import testsuite\nimport numpy", None),
    ],
)
def test_checker_catches_a_planted_import(tmp_path: Path, file: str, text: str, imported: str | None) -> None:
    plant(tmp_path, "__init__.py", "from psykern.score import score\nfrom psykern.core import DataError")
    found = violations(plant(tmp_path, file, text), tmp_path)
    assert len(found) == (imported is not None)
    assert all(f"imports {imported}" in message for message in found)


def test_checker_asks_for_a_row_for_an_unknown_module(tmp_path: Path) -> None:
    (message,) = violations(plant(tmp_path, "helpers.py", "import numpy"), tmp_path)
    assert message.startswith("helpers: not in the table") and "add a row" in message
