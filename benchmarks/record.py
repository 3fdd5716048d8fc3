"""Raw results as JSON: what was measured, on which machine, with which versions and settings."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec

from edgeseg.evaluate.latency.protocol import LatencySamples, compare
from edgeseg.machine.cpu import this_cpu
from edgeseg.machine.packages import installed_version
from edgeseg.machine.reading import core_limit, read_memory
from edgeseg.store.documents import write_json

RESULTS = Path(__file__).resolve().parent / "results"
SCHEMA_VERSION = 1
PACKAGES = (
    "edgeseg",
    "numpy",
    "torch",
    "segmentation-models-pytorch",
    "timm",
    "onnx",
    "onnxsim",
    "onnxruntime",
    "openvino",
    "nncf",
    "ray",
)


@dataclass(frozen=True)
class Machine:
    """The computer, as far as it changes figures."""

    cpu: str
    flags: tuple[str, ...]
    cores: int
    core_limit: float | None
    memory_bytes: int | None
    system: str
    python: str
    governor: str | None
    load_before: tuple[float, float, float]


@dataclass(frozen=True)
class Record:
    """One benchmark's results; ``rows`` is what it measured, raw samples included."""

    benchmark: str
    workload: str
    machine: Machine
    versions: dict[str, str]
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    ratios: dict[str, dict[str, Any]] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    commit: str | None = field(default_factory=lambda: this_commit())
    schema_version: int = SCHEMA_VERSION

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self)


def this_machine() -> Machine:
    cpu = this_cpu()
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return Machine(
        cpu=cpu.name,
        flags=cpu.flags,
        cores=cpu.cores,
        core_limit=core_limit(),
        memory_bytes=read_memory().total_bytes,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        governor=governor.read_text().strip() if governor.is_file() else None,
        load_before=os.getloadavg(),
    )


def versions() -> dict[str, str]:
    return {name: version for name in PACKAGES if (version := installed_version(name)) is not None}


def ratios(samples: dict[str, LatencySamples], baselines: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """How many times faster each contender is than each baseline: median of paired ratios and 95 % interval."""

    def ratio(base: str, name: str) -> dict[str, Any]:
        faster = compare(samples[base], samples[name])
        return {"median": faster.value, "low": faster.low, "high": faster.high, "pairs": len(samples[base].samples_ms)}

    return {
        base: {name: ratio(base, name) for name in samples if name != base} for base in baselines if base in samples
    }


def read_record(path: Path) -> Record:
    return msgspec.json.decode(path.read_bytes(), type=Record)


def this_commit() -> str | None:
    """Of the checkout, short; ``None`` where there is no git. A row kept from an earlier run has its own beside it."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
