"""Worker processes that end with the process they work for, however that one ended."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Call in a worker process: it ends when its parent does.

    A parent that is killed (out of memory, ``kill -9``) tells its workers nothing, and each keeps the others' pipes open:
    they would wait for work for ever, with an engine in memory.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()
