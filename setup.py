"""Builds the compiled modules with CMake; everything else about the package stands in pyproject.toml.

Objects stay in build/cmake-<python>, so a second build compiles only what changed, whichever command asks for it.
``CMAKE_ARGS`` in the environment is passed on, and ``CMAKE_BUILD_PARALLEL_LEVEL`` limits the jobs. ``psykern._cuda`` is
built where nvcc is found, on PATH or as ``CUDACXX``; ``PSYKERN_CUDA=OFF`` in the environment leaves it out,
``ON`` insists.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_cmake() -> str:
    """The cmake of the PyPI package where it is installed, else the system's."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise RuntimeError("cmake: expected on PATH, found none; `pip install cmake` provides it")
    return cmake


def compiled_modules() -> list[Extension]:
    """``psykern._cpu``, and ``psykern._cuda`` where it is asked for or nvcc is there."""
    wanted = os.environ.get("PSYKERN_CUDA", "AUTO").upper()
    if wanted not in ("AUTO", "ON", "OFF"):
        raise RuntimeError(f"PSYKERN_CUDA: expected AUTO, ON or OFF, got {wanted}")
    modules = [Extension("psykern._cpu", sources=[])]
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if wanted == "ON" or (wanted == "AUTO" and nvcc):
        modules.append(Extension("psykern._cuda", sources=[]))
    elif wanted == "AUTO":
        print("psykern._cuda is not built: no nvcc on PATH, and CUDACXX is not set", file=sys.stderr)
    return modules


class CMakeBuild(build_ext):
    """Builds each extension as the CMake target of the same name, and installs it where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        target = ext.name.rpartition(".")[2]
        folder = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(self.parallel or os.cpu_count() or 1)
        arguments = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPSYKERN_CUDA={'ON' if any(e.name == 'psykern._cuda' for e in self.extensions) else 'OFF'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]

        cmake = find_cmake()
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), *arguments], check=True)
        subprocess.run([cmake, "--build", str(build), "--target", target, "--parallel", jobs], check=True)
        subprocess.run([cmake, "--install", str(build), "--prefix", str(folder), "--component", target], check=True)


setup(ext_modules=compiled_modules(), cmdclass={"build_ext": CMakeBuild})
