"""Ray: one place that says it is missing, and one that begins and ends it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from edgeseg.errors import InputError, imported, one_line


@contextmanager
def connected(address: str | None, *, extra: str, purpose: str) -> Generator[Any, None, None]:
    """Yield the module ``ray``, connected; a connection that was there before is used and stays.

    Args:
        address: of the cluster; ``local``: one of its own, started on this machine until the end; ``None``: the one in
            ``RAY_ADDRESS``, else one that runs on this machine, else ``local``.
        extra: of edgeseg, that brings ray.
        purpose: what needs it, as the rest of "... is needed to <purpose>".

    Raises:
        MissingDependencyError: ray is not installed.
        InputError: no cluster at the address.
    """
    ray = imported("ray", extra, purpose)
    if ray.is_initialized():
        yield ray
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    except Exception as exc:
        # Whatever kept it from starting, or from being reached: Ray raises plain exceptions, too.
        why = one_line(exc).rstrip(".")
        address = address or os.environ.get("RAY_ADDRESS")
        if address in (None, "local"):
            raise InputError(
                f"Ray did not start on this machine: {why}; try again, or give another --ray-address"
            ) from exc
        raise InputError(f"no Ray cluster at {address}: {why}; start one with: ray start --head") from exc
    if before is not None and threading.current_thread() is threading.main_thread():
        # Ray takes it to print a stack and abort; to us it means what Ctrl-C does.
        signal.signal(signal.SIGTERM, before)
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def kept_stdout() -> Generator[None, None, None]:
    """Keep off standard output what Ray prints there, pages about every node it loses: it is ours, and may be JSON.

    Ray's own logs have it all.
    """
    with contextlib.suppress(AttributeError):  # there may be none
        sys.stdout.flush()
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            stdout = os.dup(1)
        except OSError:
            yield  # closed: compiled code cannot print there either
            return
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
