"""The machine a measurement ran on: what it is, what state it was in, and what else it was doing.

All from ``/proc``, ``/sys`` and installed packages' metadata; what a system does not tell is ``None``.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from edgeseg.machine.cpu import this_cpu
from edgeseg.machine.nvml import nvml_gpus, nvml_state
from edgeseg.machine.packages import ALL_PACKAGES, package_versions
from edgeseg.machine.reading import core_limit, read_memory, read_number, read_text
from edgeseg.machine.record import Environment, MachineState, NoiseFlag

ROOT = Path("/")
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "KMP_AFFINITY",
    "GOMP_CPU_AFFINITY",
    "CUDA_VISIBLE_DEVICES",
)
# vcgencmd get_throttled of a Raspberry Pi, as its kernel driver shows it; the bits for now, not those for "since boot".
_PI_THROTTLED = "sys/devices/platform/soc/soc:firmware/get_throttled"
_PI_BITS = {0x1: "under-voltage", 0x2: "ARM clock capped", 0x4: "throttled", 0x8: "soft temperature limit"}
MAX_OTHER_CORES = 0.25
MAX_FREQUENCY_CHANGE = 0.10


def machine_state(root: Path = ROOT) -> MachineState:
    """Clocks, temperatures, load, free memory and throttling, now."""
    gpus = nvml_state()
    return MachineState(
        cpu_mhz=_cpu_mhz(root),
        temperatures_c={**_temperatures(root), **gpus.temperatures_c},
        load=_load(root),
        memory_available_bytes=read_memory(root / "proc" / "meminfo").available_bytes,
        gpu_mhz={**_gpu_mhz(root), **gpus.gpu_mhz},
        throttled=(*_throttled(root), *gpus.throttled),
    )


def describe_machine(before: MachineState, after: MachineState, root: Path = ROOT) -> Environment:
    """The machine with its state before and after a run."""
    cpu, board = this_cpu(), read_text(root / "proc" / "device-tree" / "model")
    gpus = nvml_gpus()
    policy = root / "sys" / "devices" / "system" / "cpu" / "cpu0" / "cpufreq"
    most = read_number(policy / "cpuinfo_max_freq")
    return Environment(
        device=board or (gpus[0].name if gpus else cpu.name),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        cpu=cpu.name,
        cores=cpu.cores,
        cpu_flags=cpu.flags,
        core_limit=core_limit(),
        board=board,
        gpus=gpus,
        memory_bytes=read_memory(root / "proc" / "meminfo").total_bytes,
        governor=read_text(policy / "scaling_governor"),
        cpu_max_mhz=None if most is None else most / 1000,
        power_mode=_power_mode(root),
        jetpack=_jetpack(root),
        thread_variables={name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        versions=package_versions("edgeseg", *ALL_PACKAGES),
        before=before,
        after=after,
    )


@dataclass(frozen=True)
class Counters:
    """Counters of the machine that only grow.

    Attributes:
        seconds: monotonic clock.
        busy_s: CPU seconds all processes used, ``None`` where the system does not tell.
        own_s: CPU seconds this process and its children used.
        thermal: times a core was throttled for its heat.
        quota_s: seconds the container was held back by its CPU quota.
        overcurrent: times a Jetson was throttled for its current or voltage.
    """

    seconds: float
    busy_s: float | None
    own_s: float
    thermal: int | None = None
    quota_s: float | None = None
    overcurrent: int | None = None


def read_counters(root: Path = ROOT) -> Counters:
    """Read the counters now."""
    used = os.times()
    return Counters(
        seconds=time.monotonic(),
        busy_s=_busy_seconds(read_text(root / "proc" / "stat")),
        own_s=used.user + used.system + used.children_user + used.children_system,
        thermal=_sum_of(root / "sys" / "devices" / "system" / "cpu", "cpu[0-9]*/thermal_throttle/*_throttle_count"),
        # Under-voltage, mean and peak current of Orin and Thor (the soctherm-oc driver).
        overcurrent=_sum_of(root / "sys" / "class" / "hwmon", "hwmon*/oc[0-9]_event_cnt"),
        quota_s=_quota_seconds(root),
    )


def machine_flags(
    before: Counters, after: Counters, states: tuple[MachineState, MachineState] | None = None
) -> tuple[NoiseFlag, ...]:
    """What the machine says against a run between two readings: other load, throttling, a changed clock."""
    flags = []
    elapsed_s = after.seconds - before.seconds
    if before.busy_s is not None and after.busy_s is not None and elapsed_s > 0:
        others = (after.busy_s - before.busy_s - (after.own_s - before.own_s)) / elapsed_s
        if others > MAX_OTHER_CORES:
            flags.append(NoiseFlag("other-load", f"other processes used {others:.1f} cores meanwhile"))
    if before.thermal is not None and after.thermal is not None and after.thermal > before.thermal:
        flags.append(NoiseFlag("throttled", f"cores were throttled for heat {after.thermal - before.thermal} times"))
    if before.overcurrent is not None and after.overcurrent is not None and after.overcurrent > before.overcurrent:
        times = after.overcurrent - before.overcurrent
        flags.append(NoiseFlag("throttled", f"the board was throttled for over-current or under-voltage {times} times"))
    if before.quota_s is not None and after.quota_s is not None and after.quota_s > before.quota_s:
        flags.append(
            NoiseFlag("throttled", f"the container's CPU quota held it back {after.quota_s - before.quota_s:.2f} s")
        )
    if states is not None and states[1].throttled:
        flags.append(NoiseFlag("throttled", f"held back at the end of the run: {', '.join(states[1].throttled)}"))
    if states is not None and states[0].cpu_mhz is not None and states[1].cpu_mhz is not None:
        first, second = states[0].cpu_mhz[1], states[1].cpu_mhz[1]
        if first > 0 and abs(second / first - 1) > MAX_FREQUENCY_CHANGE:
            flags.append(NoiseFlag("frequency", f"the CPU went from {first:.0f} to {second:.0f} MHz"))
    return tuple(flags)


class MachineWatch:
    """What the machine says against a run that begins now; :meth:`warm` is told when all that is measured is warm."""

    def __init__(self) -> None:
        self._before = read_counters()
        self._warm: MachineState | None = None

    def warm(self) -> None:
        """A clock that rises when work begins is no reason to distrust what follows: only the first call counts."""
        self._warm = self._warm or machine_state()

    def flags(self) -> tuple[NoiseFlag, ...]:
        """The flags of the run that ends now."""
        now = machine_state()
        return machine_flags(self._before, read_counters(), (self._warm or now, now))


def _busy_seconds(stat: str | None) -> float | None:
    # "cpu  user nice system idle iowait irq softirq steal guest guest_nice"; guest time is inside user time already.
    fields = (stat or "").partition("\n")[0].split()
    if len(fields) < 5 or fields[0] != "cpu":
        return None
    numbers = [int(n) for n in fields[1:9]]
    busy = sum(numbers) - numbers[3] - (numbers[4] if len(numbers) > 4 else 0)
    return busy / os.sysconf("SC_CLK_TCK")


def _quota_seconds(root: Path) -> float | None:
    for place, key, unit in (
        ("sys/fs/cgroup/cpu.stat", "throttled_usec", 1e6),
        ("sys/fs/cgroup/cpu/cpu.stat", "throttled_time", 1e9),
    ):
        for line in (read_text(root / place) or "").splitlines():
            name, _, value = line.partition(" ")
            if name == key and value.isdigit():
                return int(value) / unit
    return None


def _cpu_mhz(root: Path) -> tuple[float, float, float] | None:
    folder = root / "sys" / "devices" / "system" / "cpu"
    clocks = [
        mhz / 1000 for p in folder.glob("cpu[0-9]*/cpufreq/scaling_cur_freq") if (mhz := read_number(p)) is not None
    ]
    if not clocks:
        text = read_text(root / "proc" / "cpuinfo") or ""
        clocks = [float(m) for m in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text, flags=re.MULTILINE)]
    return (min(clocks), statistics.median(clocks), max(clocks)) if clocks else None


def _sum_of(folder: Path, pattern: str) -> int | None:
    counts = [int(count) for path in sorted(folder.glob(pattern)) if (count := read_number(path)) is not None]
    return sum(counts) if counts else None


def _gpu_mhz(root: Path) -> dict[str, float]:
    """Clocks of a Jetson's GPU: 57000000.gpu, 17000000.gv11b, 17000000.ga10b, or gpu-gpc-0 and gpu-nvd-0 on Thor."""
    folders = sorted((root / "sys" / "class" / "devfreq").glob("*"))
    named = [f for f in folders if re.search(r"gpu|gp10b|gv11b|ga10b", f.name)]
    return {f.name: hertz / 1e6 for f in named if (hertz := read_number(f / "cur_freq")) is not None}


def _throttled(root: Path) -> tuple[str, ...]:
    """Cooling devices that hold clocks back now, and a Raspberry Pi's own word for it."""
    reasons = []
    for device in sorted((root / "sys" / "class" / "thermal").glob("cooling_device*")):
        kind, state = read_text(device / "type") or "", read_number(device / "cur_state")
        # Not fans, and not a Jetson's devfreq-*, whose state is the clock it idles at.
        if state is not None and state > 0 and (kind.endswith("-alert") or "cpufreq" in kind):
            reasons.append(kind)
    bits = int(read_text(root / _PI_THROTTLED) or "0", 16)
    return (*reasons, *(words for bit, words in _PI_BITS.items() if bits & bit))


def _temperatures(root: Path) -> dict[str, float]:
    by_zone: dict[str, float] = {}
    for zone in sorted((root / "sys" / "class" / "thermal").glob("thermal_zone*")):
        milli_c, kind = read_number(zone / "temp"), read_text(zone / "type")
        # Sensors that are switched off read -256 C on a Jetson, 0 K elsewhere.
        if milli_c is not None and -40_000 < milli_c < 200_000:
            by_zone[kind or zone.name] = milli_c / 1000
    return by_zone


def _load(root: Path) -> tuple[float, float, float] | None:
    words = (read_text(root / "proc" / "loadavg") or "").split()
    return (float(words[0]), float(words[1]), float(words[2])) if len(words) >= 3 else None


def _jetpack(root: Path) -> str | None:
    """``6.2+b77 (L4T 36.4.3)``: of the package nvidia-jetpack where it is installed, and of the board's own release file."""
    release = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", read_text(root / "etc" / "nv_tegra_release") or "")
    if release is None:
        return None
    l4t = f"L4T {release[1]}.{release[2]}"
    packages = read_text(root / "var" / "lib" / "dpkg" / "status") or ""
    package = re.search(r"^Package: nvidia-jetpack\n(?:.+\n)*?Version: (\S+)", packages, re.MULTILINE)
    return l4t if package is None else f"{package[1]} ({l4t})"


def _power_mode(root: Path) -> str | None:
    """nvpmodel's mode on a Jetson: its number from the status file, its name from the configuration."""
    status = read_text(root / "var" / "lib" / "nvpmodel" / "status")
    match = re.search(r"pmode:0*(\d+)", status or "")
    if match is None:
        return None
    names: list[tuple[str, str]] = re.findall(
        r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", read_text(root / "etc" / "nvpmodel.conf") or ""
    )
    return dict(names).get(match[1], f"mode {match[1]}")
