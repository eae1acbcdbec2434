"""Addresses of what lies elsewhere: which text is one, and how much of it may be shown."""

from __future__ import annotations

import re

from .printable import printable

__all__ = ["is_url", "shown_url"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(text: str) -> bool:
    """Whether a text is an address, of whatever kind."""
    return _URL.match(text) is not None


def shown_url(text: str) -> str:
    """An address as messages show it: without a user, a password or a query."""
    scheme, _, rest = re.split(r"[?#]", text, maxsplit=1)[0].partition("://")
    return printable(f"{scheme}://{rest.rpartition('@')[2]}", 300)
