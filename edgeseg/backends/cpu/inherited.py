"""Sessions that a process has from the one it was forked from. Their threads stayed there: freeing one waits for them."""

from __future__ import annotations

import ctypes
import os
import weakref

_open: weakref.WeakSet[object] = weakref.WeakSet()


def keep_in_forks(session: object) -> None:
    """Never free ``session``, a backend's own object with threads, in processes forked from this one."""
    _open.add(session)


def _keep_all() -> None:
    for session in _open:
        # A reference of its own that nothing gives back: the interpreter's end would free what a list of ours holds.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_keep_all)
