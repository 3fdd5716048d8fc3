"""What is recorded of a machine: what it is, its state, the noise on it, the power it draws."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

import msgspec

# What a report from elsewhere may say: figures are divided by, and their logarithms taken.
Finite: TypeAlias = Annotated[float, msgspec.Meta(ge=-1e15, le=1e15)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53)]

NoiseKind: TypeAlias = Literal["variation", "outliers", "drift", "few-samples", "frequency", "throttled", "other-load"]


@dataclass(frozen=True)
class NoiseFlag:
    """A reason not to trust a run: its kind, and one line that says what was seen."""

    kind: NoiseKind
    detail: str


@dataclass(frozen=True)
class Power:
    """Power drawn while the row was measured.

    Attributes:
        source: ``tegrastats``, ``ina3221``, ``nvml`` or ``rapl``.
        covers: what is metered, in words (``VDD_IN: the whole module``); figures of different sources do not compare.
        mean_w: watts, mean over the run.
        idle_w: watts before the run, ``None`` when not taken.
        energy_per_image_j: joules per image: mean power over images per second.
        rails_w: mean per rail.
        readings: how many.
    """

    source: str
    covers: str
    mean_w: Finite
    energy_per_image_j: Finite
    readings: Count
    idle_w: Finite | None = None
    rails_w: dict[str, Finite] = field(default_factory=dict)


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it."""

    name: str
    memory_bytes: Count | None = None
    driver: str | None = None
    power_limit_w: Finite | None = None


@dataclass(frozen=True)
class MachineState:
    """What changes while measuring; taken before and after.

    ``cpu_mhz``: least, median and most over the cores; ``gpu_mhz``: by GPU or its clock domain; ``temperatures_c``: by
    sensor; ``load``: 1, 5 and 15 minutes; ``throttled``: why the machine holds its clocks back right now, a line each.
    """

    cpu_mhz: tuple[Finite, Finite, Finite] | None = None
    temperatures_c: dict[str, Finite] = field(default_factory=dict)
    load: tuple[Finite, Finite, Finite] | None = None
    memory_available_bytes: Count | None = None
    gpu_mhz: dict[str, Finite] = field(default_factory=dict)
    throttled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Environment:
    """The machine. ``device`` is its short name in tables: the board's, else GPU or CPU.

    ``power_mode``: of nvpmodel, on a Jetson; ``jetpack``: its version, as far as packages and L4T's release file tell;
    ``thread_variables``: those of ``OMP_NUM_THREADS`` and the like that are set.
    """

    device: str
    system: str
    python: str
    cpu: str
    cores: Count
    cpu_flags: tuple[str, ...] = ()
    core_limit: Finite | None = None
    board: str | None = None
    gpus: tuple[Gpu, ...] = ()
    memory_bytes: Count | None = None
    governor: str | None = None
    cpu_max_mhz: Finite | None = None
    power_mode: str | None = None
    jetpack: str | None = None
    thread_variables: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    before: MachineState = field(default_factory=MachineState)
    after: MachineState = field(default_factory=MachineState)
