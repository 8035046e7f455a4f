"""Who may import whom: a table of rooms, checked by reading the source.

A module may import of psykern what its room's row in ``ROOMS`` names, and its own room; a row for a single module
(``demo.train``) goes before that of its room. An allowed room allows all of its modules. ``psykern`` stands for the
public API: a name that ``psykern/__init__.py`` defines, not a module below it. ``WITHOUT`` names what a room does
without of the outside.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ROOMS: dict[str, set[str]] = {
    "version": set(),
    "core": set(),
    "_cpu": set(),
    "_cuda": set(),
    "kernels": {"core", "_cpu", "_cuda"},
    "data": {"core", "version"},
    "models": {"core", "kernels"},
    "engine": {"core", "kernels", "models", "_cpu"},
    "scoring": {"core", "kernels", "data", "models", "engine"},
    "runs": {"core", "kernels", "data", "models", "engine", "scoring", "version"},
    "study": {"core", "runs.order", "runs.summary", "version"},
    "integrations": {"psykern"},
    "demo": set(),
    "demo.train": {"demo"},
    "demo.posttrain": {"demo"},
    "demo.examples": {"psykern", "demo", "kernels", "integrations"},
    "listing": set(),
    "signals": set(),
    "cli": {"psykern", "demo", "integrations", "listing", "signals"},
    "__main__": {"cli"},
    "psykern": {"core", "kernels", "runs", "scoring", "study", "version"},
}
WITHOUT: dict[str, set[str]] = {
    "core": {"torch", "transformers", "triton", "pyarrow"},
    "data": {"torch", "triton"},
    "study": {"torch", "triton", "transformers"},
}


def module_name(path: Path, root: Path) -> str:
    """``kernels.cpu`` for psykern/kernels/cpu.py, ``psykern`` for the package itself."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(part for part in parts[1:] if part != "__init__") or "psykern"


def public_names(root: Path) -> set[str]:
    """What psykern/__init__.py defines or imports by name."""
    init = root / "psykern" / "__init__.py"
    names: set[str] = set()
    body = ast.parse(init.read_text(encoding="utf-8")).body
    for node in (inner for outer in body for inner in [outer, *getattr(outer, "body", [])]):  # an if's body too
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
    """What a file imports against the tables, one message each."""
    module = module_name(path, root)
    row = module
    while row not in ROOMS and "." in row:
        row = row.rpartition(".")[0]
    if row not in ROOMS:
        return [
            f"{module}: in no room of tests/test_imports.py; put it in one, or add a row that says what it may import"
        ]
    allowed = ROOMS[row] | ({row} if (root / "psykern" / row).is_dir() and row == module.partition(".")[0] else set())
    found = []
    for line, name in imports(path, root):
        top, _, rest = name.partition(".")
        if top in {"tests", "benchmarks"}:
            found.append(f"{module}, line {line}: imports {name}, which is not part of the package")
        elif top == "psykern" and not is_within(rest or "psykern", allowed):
            named = ", ".join(sorted(allowed)) or "nothing"
            found.append(f"{module}, line {line}: imports {name}; of psykern it may import {named}")
        elif top in WITHOUT.get(row, set()):
            found.append(f"{module}, line {line}: imports {name}; {row} does without")
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
        ("engine/plan.py", "from psykern.data.encode import Encoder", "psykern.data.encode"),
        ("engine/plan.py", "import psykern.data.encode", "psykern.data.encode"),
        ("engine/plan.py", "import psykern", "psykern"),
        ("engine/plan.py", "from psykern import score", "psykern"),
        ("engine/plan.py", "from ..data import encode", "psykern.data"),
        ("engine/plan.py", "from . import engine\nfrom .engine import run", None),
        ("engine/plan.py", "def f():\n    from psykern import data", "psykern.data"),
        ("kernels/__init__.py", "from psykern.models.model import Model", "psykern.models.model"),
        ("kernels/triton/rope.py", "from ...data import rows", "psykern.data"),
        ("kernels/triton/rope.py", "from ..data import rows", None),  # that is psykern.kernels.data
        ("kernels/triton/rope.py", "from psykern.kernels import reference\nfrom psykern import _cuda", None),
        ("data/rows.py", "from psykern.data.units import Unit", None),
        ("data/rows.py", "import torch", "torch"),
        ("data/rows.py", "def f():\n    from torch import Tensor", "torch"),
        ("models/rope.py", "import torch", None),
        ("study/page.py", "from psykern.runs.summary import Summary", None),
        ("study/page.py", "from psykern.runs.run import score", "psykern.runs.run"),
        ("demo/train.py", "from psykern.demo import SAMPLE", None),
        ("cli.py", "from psykern import score, DataError", None),
        ("cli.py", "from psykern import engine", "psykern.engine"),
        ("cli.py", "import psykern\npsykern.score()\npsykern.demo.MODEL", None),
        ("cli.py", "import psykern\npsykern.engine.run()", "psykern.engine"),
        ("cli.py", "from psykern.runs.run import score", "psykern.runs.run"),
        ("models/model.py", "from psykern.kernels_old import rope", "psykern.kernels_old"),
        ("models/model.py", "from tests.conftest import shared", "tests.conftest"),
        ("models/model.py", "import benchmarks", "benchmarks"),
        ("models/model.py", "import testsuite\nimport numpy", None),
    ],
)
def test_checker_catches_a_planted_import(tmp_path: Path, file: str, text: str, imported: str | None) -> None:
    plant(tmp_path, "__init__.py", "from psykern.runs.run import score\nfrom psykern.core.types import DataError")
    found = violations(plant(tmp_path, file, text), tmp_path)
    assert len(found) == (imported is not None)
    assert all(f"imports {imported}" in message for message in found)


def test_checker_asks_for_a_room_for_an_unknown_module(tmp_path: Path) -> None:
    (message,) = violations(plant(tmp_path, "helpers.py", "import numpy"), tmp_path)
    assert message.startswith("helpers: in no room") and "add a row" in message


@pytest.mark.parametrize("room", WITHOUT)
def test_a_room_loads_without_what_it_does_without(room: str) -> None:
    """Also by way of others' imports: every module of the room in a process of its own."""
    modules = [f"psykern.{module_name(path, ROOT)}" for path in SOURCES if path.is_relative_to(ROOT / "psykern" / room)]
    code = f"import {', '.join(modules)}, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert not WITHOUT[room] & set(loaded.stdout.split())


def test_the_public_names_are_there_and_have_their_types() -> None:
    """What is loaded when it is asked for, what a type checker reads, and what is documented as public are the same."""
    import psykern

    assert set(psykern.__all__) - {"__version__"} == set(psykern._HOME)
    assert set(psykern.__all__) <= public_names(ROOT) & set(dir(psykern))
    assert all(getattr(psykern, name) is not None for name in psykern.__all__)
    code = "import psykern; print(psykern.kernels.silu_mul.__name__, psykern.demo.MODEL.name)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = psykern.nothing


@pytest.mark.parametrize("command", ["import psykern", "import psykern; psykern.BackendError, psykern.Settings"])
def test_importing_psykern_loads_nothing_heavy(command: str) -> None:
    code = f"{command}; import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert not {"torch", "transformers", "pyarrow", "tokenizers", "psykern.runs"} & set(loaded.stdout.split())


def test_the_readme_names_every_file() -> None:
    files = (ROOT / "README.md").read_text(encoding="utf-8").split("## Files\n")[1].split("## Testing\n")[0]
    named = set(re.findall(r"[\w_]+", files))
    modules = {path.stem for path in SOURCES if path.suffix == ".py"} - {"__init__", "__main__", "version"}
    inside = {"elementwise", "experts", "option_logprobs", "prefix_attention", "common"}  # of a folder named
    inside |= {"posttrain", "train"}
    for folder in ("study/figures", "demo/examples"):
        inside |= {path.stem for path in (ROOT / "psykern" / folder).glob("*.py")}
    assert modules - named - inside == set()
    rooms = {path.name for path in (ROOT / "psykern").iterdir() if (path / "__init__.py").is_file()}
    assert all(f"psykern/{room}/ " in files for room in rooms)
