"""PyTorch as most people run it: eager, contiguous, float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers import Contender
from benchmarks.workload import Workload
from edgeseg.backends.pytorch import PyTorchSession


def prepare(work: Workload, folder: Path) -> Contender:
    return contender(work)


def contender(work: Workload, **options: Any) -> Contender:
    session = PyTorchSession(work.loaded, work.spec, **options)
    return Contender(lambda image: session.run(image[None])["mask"][0], settings=session.options)
