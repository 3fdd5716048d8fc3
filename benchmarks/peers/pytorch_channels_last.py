"""PyTorch eager in the channels_last memory format, faster on CPUs with oneDNN."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers import Contender
from benchmarks.peers.pytorch_eager import contender
from benchmarks.workload import Workload


def prepare(work: Workload, folder: Path) -> Contender:
    return contender(work, channels_last=True)
