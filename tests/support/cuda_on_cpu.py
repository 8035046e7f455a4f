"""Builds psykern._cuda for the CPU: the kernels' own sources, with launches and threads as cuda_on_cpu.h has them."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
_LAUNCH = re.compile(r"(\w+(?:<T[^;]*?>)?)\s*<<<(.*?)>>>\(", re.DOTALL)


def build(folder: Path, cuda_include: Path) -> ModuleType:
    """Compiles with g++ in ``folder``. Raises ``CalledProcessError`` where that fails."""
    includes = [SOURCES, Path(__file__).parent, cuda_include, pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-std=c++17", "-O0", "-fPIC", "-w", *(f"-I{path}" for path in includes)]
    objects = []
    commands = []
    for source in [*sorted(SOURCES.glob("*.cu")), SOURCES / "bind.cpp"]:
        text = source.read_text()
        if source.suffix == ".cu":
            text, launches = _LAUNCH.subn(r"on_cpu::launch(\1, \2)(", text)
            assert launches == source.read_text().count("<<<") > 0, f"{source.name}: a launch was not understood"
            text = f'#include "cuda_on_cpu.h"\n{text}'
        copy = folder / f"{source.stem}.cpp"
        copy.write_text(text)
        objects.append(str(copy.with_suffix(".o")))
        commands.append(["g++", *flags, "-c", str(copy), "-o", objects[-1]])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", *objects, "-o", str(module)], check=True)
    spec = importlib.util.spec_from_file_location("cuda_on_cpu._cuda", module)  # pybind11 keeps modules by name
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
