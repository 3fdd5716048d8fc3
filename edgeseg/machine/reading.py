"""Small files of ``/proc`` and ``/sys``: their text, or ``None`` where a system does not tell."""

from __future__ import annotations

from pathlib import Path


def read_text(path: Path) -> str | None:
    """A small file's text without surrounding white space and zero bytes; ``None`` if it cannot be read or is empty."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\x00 \n\t") or None
    except OSError:
        return None


def read_number(path: Path) -> float | None:
    """A file that holds one number; ``None`` if it does not."""
    text = read_text(path)
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
