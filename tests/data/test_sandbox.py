"""The date that a chat template prints: as C's strftime prints it, wherever the process runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from psykern.data.sandbox import compiled

ROOT = Path(__file__).resolve().parents[2]
DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnpPrRSTuUVwWxXyYzZ%"
FORMAT = " ".join(f"{letter}=%{letter}" for letter in DIRECTIVES) + " %%B %-d %%%b"


def printed(format: str, date: str) -> str:
    return str(compiled(f"{{{{ strftime_now('{format}') }}}}", date).render())


@pytest.mark.parametrize("date", ["2026-01-01", "2024-02-29", "2026-11-30", "1999-12-31", "2026-05-08"])
def test_every_directive_is_that_of_c(date: str) -> None:
    assert printed(FORMAT, date) == datetime.fromisoformat(date).strftime(FORMAT)


def test_neither_locale_nor_time_zone_changes_a_date(tmp_path: Path) -> None:
    """In a process that speaks German and is far from Greenwich."""
    if shutil.which("localedef") is None:
        pytest.skip("no localedef to make a locale with")
    made = subprocess.run(
        ["localedef", "-i", "de_DE", "-f", "UTF-8", tmp_path / "de_DE.UTF-8"], capture_output=True, text=True
    )
    if not (tmp_path / "de_DE.UTF-8").exists():
        pytest.skip(f"localedef makes no German locale: {made.stderr.strip()}")
    script = (
        "import locale, sys\n"
        "from datetime import datetime\n"
        "from psykern.data.sandbox import compiled\n"
        "locale.setlocale(locale.LC_ALL, 'de_DE.UTF-8')\n"
        "assert datetime(2026, 12, 8).strftime('%A %B') == 'Dienstag Dezember'\n"
        "print(compiled(\"{{ strftime_now(format) }}\", '2026-12-08').render(format=sys.argv[1]))\n"
    )
    format = f"{FORMAT} %s"
    environment = os.environ | {"LOCPATH": str(tmp_path), "TZ": "Pacific/Auckland", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", script, format], env=environment, capture_output=True, text=True, check=True
    )
    seconds = 1796688000  # from 1970 on: 20,795 days
    assert process.stdout.rstrip("\n") == datetime(2026, 12, 8).strftime(FORMAT) + f" {seconds}"
