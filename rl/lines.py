"""Writes what a message shows on one line."""

from typing import Any


def short(value: Any, most: int = 200) -> str:
    """Returns the first `most` characters of what a message shows, on one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[:most]}..."
