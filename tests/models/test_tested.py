"""What is said to be tested of each family: in ``psykern models``, and in README."""

from __future__ import annotations

import pytest
from support import models_page

from psykern.cli import main
from psykern.listing import REFUSED
from psykern.models.families import FAMILIES


def test_the_tables_are_written_from_the_tests() -> None:
    again = "run: PYTHONPATH=.:tests python tests/support/models_page.py"
    for path, table in (
        (models_page.TABLE, models_page.table()),
        (models_page.FOREIGN_TABLE, models_page.foreign_table()),
    ):
        assert path.read_text(encoding="utf-8") == models_page.as_tsv(table), again
    readme = models_page.README.read_text(encoding="utf-8")
    assert readme.count(models_page.BEGIN) == readme.count(models_page.END) == 2
    assert readme == models_page.in_readme(readme), again


def test_the_command_has_a_line_for_each_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    native, _, said_of_others, foreign, refused = capsys.readouterr().out.rstrip().split("\n\n")
    heading, *lines = native.splitlines()
    assert [line.split()[0] for line in lines] == list(FAMILIES)
    said = {line.split()[0]: line for line in lines}
    place = heading.index("rotary embedding")
    assert said["llama"][place:].startswith("default, llama3, linear")
    assert "yes" in said["olmo3"] and "tied" in said["qwen3_vl"] and "cross-attention skipped" in said["mllama"]
    assert "--implementation transformers" in said_of_others
    kinds = {line.split()[0]: line for line in foreign.splitlines()[1:]}
    assert list(kinds) == [row[0] for row in models_page.foreign_table()[1:]]
    assert kinds["gpt2"].endswith("computed once") and kinds["gemma2"].endswith("computed once, by its own attention")
    assert "one pass per sequence: a convolution" in kinds["mamba"]
    assert [line.split("  ")[0] for line in refused.splitlines()[1:]] == list(REFUSED)
