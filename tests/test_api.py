"""API.md: what is public is on it, documented, and nothing else."""

from __future__ import annotations

import re

import pytest
from support import api_page

import psykern


def test_the_page_is_written_from_the_docstrings() -> None:
    assert api_page.PAGE.read_text(encoding="utf-8") == api_page.page(), "run: python tests/support/api_page.py"


def test_every_public_name_has_its_entry() -> None:
    found = re.findall(r"^### (?:class )?`psykern\.(?!kernels\.|integrations\.)(\w+)", api_page.page(), re.MULTILINE)
    assert sorted(found) == sorted(set(psykern.__all__) - {"__version__"})


@pytest.mark.parametrize("name", sorted(set(psykern.__all__) - {"__version__"}))
def test_a_public_name_is_documented(name: str) -> None:
    value = getattr(psykern, name)
    assert value.__doc__ and not value.__doc__.startswith(f"{name}("), f"{name} has no docstring of its own"
    if isinstance(value, type):
        bare = [method for method, doc in api_page.methods_of(value) if not doc]
        assert not bare, f"{name}: methods without a docstring"


@pytest.mark.parametrize("name", [name for name, _ in api_page.operations()])
def test_an_operation_is_documented(name: str) -> None:
    assert dict(api_page.operations())[name].__doc__
