"""``psykern`` and ``python -m psykern``: the command line.

Ctrl-C while it is being loaded, which takes seconds, ends it at once: nothing is begun yet. Raised as an exception it
could come anywhere in a library's import, which may print it, change it or go on.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """The exit status; :mod:`psykern.cli` takes the signals over."""
    signal.signal(signal.SIGINT, _leave)
    from psykern.cli import main as command

    return command()


def _leave(number: int, frame: object) -> None:
    del frame
    os.write(2, b"\npsykern: interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
