"""Ids of the hub: ``owner/name``, and ``owner/name@REVISION`` for a branch, tag or commit of it."""

from __future__ import annotations

import re

_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^\s\0]+))?")


def split_revision(text: str) -> tuple[str, str | None]:
    """Id and revision; ``text`` itself and None where it is no id with a revision."""
    found = _ID.fullmatch(text)
    return (found["id"], found["revision"]) if found else (text, None)


def is_hub_id(text: str) -> bool:
    """With a revision or without one."""
    return _ID.fullmatch(text) is not None
