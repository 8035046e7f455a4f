"""Compiles one CUDA source for CMake and keeps what ptxas says of its kernels: OBJECT.ptxas beside OBJECT.

    python keep_ptxas_report.py nvcc -Xptxas -v … -o OBJECT

The lines of ptxas's report go to that file, all others where they would have gone. It is read by
tests/kernels/test_cuda_build.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

REPORT = re.compile(r"ptxas info|\s+\d+ bytes stack frame")


def main(command: list[str]) -> int:
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    lines = done.stderr.splitlines(keepends=True)
    sys.stderr.writelines(line for line in lines if not REPORT.match(line))
    if done.returncode == 0 and "-o" in command:
        target = Path(command[command.index("-o") + 1])
        target.with_name(f"{target.name}.ptxas").write_text("".join(line for line in lines if REPORT.match(line)))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
