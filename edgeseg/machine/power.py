"""Power while something runs: Jetson's INA3221 and tegrastats, NVIDIA's NVML, Intel's and AMD's RAPL.

Each source meters something else (a module, a board, a CPU package), so its figures compare with its own only. Where no
source can be read there is no figure.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from edgeseg.machine.nvml import NvmlSource, import_nvml
from edgeseg.machine.reading import read_number, read_text
from edgeseg.machine.record import Power

ROOT = Path("/")

# Now/mean, from JetPack 7.2 on now/mean/peak: "POM_5V_IN 2132/2132" (JetPack 4), "VDD_IN 5336mW/4970mW" (5 and 6),
# "VIN 87426mW/43713mW/87426mW" (7.2); some builds print the present value alone. A sensor near zero may read a little
# below. Rails of AGX Xavier have plain names, which words such as CPU@48C, "GPU 12%" or "RAM 1/2MB" must not look like.
_RAIL = re.compile(
    r"(?<!\S)(POM_[A-Z0-9_]+|VDD_[A-Z0-9_]+|VDDQ_[A-Z0-9_]+|VIN(?:_[A-Z0-9_]+)?|GPU|CPU|SOC|CV|VDDRQ|SYS5V)"
    r" (?:(-?\d+)mW(?:/-?\d+mW){0,2}|(-?\d+)/-?\d+)(?!\S)"
)
# Rails that carry everything behind them, best first.
_INPUT_RAILS = ("VIN", "VDD_IN", "POM_5V_IN", "5V_IN")
# Fed by VIN_SYS_5V0 on AGX Orin: adding it would count the memory twice.
_INSIDE_ANOTHER = frozenset({"VDDQ_VDD2_1V8AO"})


class PowerSource(Protocol):
    """Something that can be asked for the power drawn now."""

    name: str

    def watts(self) -> Mapping[str, float]:
        """Watts by rail, now (a counter of energy: mean since it was last asked); empty when nothing could be read."""
        ...

    def close(self) -> None:
        """Let go of what was opened."""
        ...


def parse_tegrastats(line: str) -> dict[str, float]:
    """Watts by rail, the present value, of one line of ``tegrastats`` (JetPack 4 to 7); empty without power rails."""
    return {name: int(now or bare) / 1000 for name, now, bare in _RAIL.findall(line)}


def read_ina3221(root: Path = ROOT) -> dict[str, float]:
    """Watts by rail from sysfs.

    JetPack 4: ``/sys/bus/i2c/drivers/ina3221x/*/iio*/in_power<n>_input`` (mW) and ``rail_name_<n>``. JetPack 5 on:
    ``/sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in<n>_label``, ``in<n>_input`` (mV) and ``curr<n>_input`` (mA). JetPack 7
    (Thor) besides: ``ina238`` with ``power1_input`` (uW).
    """
    drivers = root / "sys" / "bus" / "i2c" / "drivers"
    watts: dict[str, float] = {}
    # Both "iio:device0" and, on older kernels, the link "iio_device" name the same chip.
    for folder in sorted({p.resolve() for p in drivers.glob("ina3221x/*/iio*") if p.is_dir()}):
        for index in range(3):
            rail, milliwatts = read_text(folder / f"rail_name_{index}"), read_number(folder / f"in_power{index}_input")
            if rail and milliwatts is not None:
                watts[rail] = milliwatts / 1000
    for folder in sorted(drivers.glob("ina3221/*/hwmon/hwmon*")):
        for index in (1, 2, 3):
            rail = read_text(folder / f"in{index}_label")
            millivolts, milliamperes = (
                read_number(folder / f"in{index}_input"),
                read_number(folder / f"curr{index}_input"),
            )
            if rail and rail != "NC" and millivolts is not None and milliamperes is not None:
                watts[rail] = millivolts * milliamperes / 1e6
    for folder in sorted(drivers.glob("ina238/*/hwmon/hwmon*")):
        microwatts = read_number(folder / "power1_input")
        if microwatts is not None:
            watts[read_text(folder / "label") or read_text(folder / "in1_label") or "VIN"] = microwatts / 1e6
    return watts


def total_power(source: str, rails: Mapping[str, float]) -> tuple[float, str]:
    """(watts, what they cover in words) of the rails of one source. Raises ``ValueError`` without rails."""
    if not rails:
        raise ValueError("no rails")
    if source == "rapl":
        return sum(rails.values()), f"{' + '.join(rails)}: CPU package only"
    if source == "nvml":
        return sum(rails.values()), f"{' + '.join(rails)}: GPU board only"
    for rail in _INPUT_RAILS:
        if rail in rails:
            return rails[rail], f"{rail}: all that the board or module draws"
    parts = {name: watts for name, watts in rails.items() if name not in _INSIDE_ANOTHER}
    return sum(parts.values()), f"{' + '.join(parts)}: the module's rails, without the carrier board's input"


class InaSource:
    """INA3221 and INA238 power monitors of a Jetson, through sysfs."""

    name = "ina3221"

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root

    def watts(self) -> Mapping[str, float]:
        """See :class:`PowerSource`."""
        return read_ina3221(self._root)

    def close(self) -> None:
        """Nothing was opened."""


class TegrastatsSource:
    """Lines of a running ``tegrastats``; some rails are told to root alone.

    Raises:
        OSError: the command cannot be started.
    """

    name = "tegrastats"

    def __init__(self, command: str) -> None:
        self._process = subprocess.Popen(
            [command, "--interval", "100"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
        )
        self._last: Mapping[str, float] = {}
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None  # asked for as a pipe
        for line in self._process.stdout:
            self._last = parse_tegrastats(line)
            self._first.set()
        # It has ended: its last line is not what is drawn from now on.
        self._last = {}
        self._first.set()

    def watts(self) -> Mapping[str, float]:
        """See :class:`PowerSource`."""
        self._first.wait(timeout=2.0)
        return self._last

    def close(self) -> None:
        """End the process that was started."""
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join(timeout=5)
        if self._process.stdout is not None:
            self._process.stdout.close()


class RaplSource:
    """Energy counters of CPU packages; readable by root alone on most systems since 2020."""

    name = "rapl"

    def __init__(self, root: Path = ROOT, clock: Callable[[], float] = time.monotonic) -> None:
        zones = sorted((root / "sys" / "class" / "powercap").glob("*-rapl:[0-9]*"))
        # Subzones (intel-rapl:0:1) are part of their package.
        packages = [zone for zone in zones if zone.name.count(":") == 1]
        self._folders = [zone for zone in packages if (read_text(zone / "name") or "").startswith("package")]
        self._clock = clock
        self._before = self._read()

    def _read(self) -> dict[str, tuple[float, float]]:
        counters = {}
        for folder in self._folders:
            name, microjoules = read_text(folder / "name"), read_number(folder / "energy_uj")
            if name and microjoules is not None:
                counters[name] = (self._clock(), microjoules)
        return counters

    def watts(self) -> Mapping[str, float]:
        """See :class:`PowerSource`: mean since it was last asked."""
        before, now = self._before, self._read()
        self._before = now
        ranges = {read_text(f / "name"): read_number(f / "max_energy_range_uj") for f in self._folders}
        by_zone = {}
        for name, (seconds, microjoules) in now.items():
            if name not in before or seconds <= before[name][0]:
                continue
            used = microjoules - before[name][1]
            if used < 0:  # the counter wrapped
                used += ranges[name] or 0.0
            if used >= 0:
                by_zone[name] = used / 1e6 / (seconds - before[name][0])
        return by_zone

    @property
    def is_readable(self) -> bool:
        """Whether any counter could be read."""
        return bool(self._before)

    def close(self) -> None:
        """Nothing was opened."""


def find_source(
    root: Path = ROOT, *, nvml: Any = None, tegrastats: str | None = None, say: Callable[[str], None] | None = None
) -> PowerSource | None:
    """The best power source that really answers here, or ``None``.

    Args:
        root: where ``/sys`` is.
        nvml: the nvidia-ml-py module; ``None`` imports it if it is installed.
        tegrastats: its command; ``None`` looks for it.
        say: told of a source that is there and cannot be used, and why.
    """
    if read_ina3221(root):
        return InaSource(root)
    command = tegrastats or shutil.which("tegrastats")
    if command is not None:
        try:
            if (source := _answering(TegrastatsSource(command))) is not None:
                return source
        except OSError as exc:
            if say is not None:
                say(f"{command} cannot be started ({exc.strerror}): its power rails are not read")
    module = nvml or import_nvml()
    if module is not None:
        try:
            if (source := _answering(NvmlSource(module))) is not None:
                return source
        except module.NVMLError:
            pass  # installed without a driver
    rapl = RaplSource(root)
    return rapl if rapl.is_readable else None


def _answering(source: PowerSource) -> PowerSource | None:
    if source.watts():
        return source
    source.close()
    return None


@dataclass
class PowerLog:
    """Readings taken while a block ran; :meth:`result` is their summary."""

    source: str
    readings: list[Mapping[str, float]] = field(default_factory=list)

    def result(self, images_per_s: float, idle_w: float | None = None) -> Power | None:
        """Mean power and energy per image; ``None`` without readings."""
        if not self.readings or images_per_s <= 0:
            return None
        names = sorted({name for reading in self.readings for name in reading})
        rails = {
            name: sum(values) / len(values)
            for name in names
            if (values := [reading[name] for reading in self.readings if name in reading])
        }
        mean_w, covers = total_power(self.source, rails)
        return Power(self.source, covers, mean_w, mean_w / images_per_s, len(self.readings), idle_w, rails)


@contextmanager
def power_log(source: PowerSource, interval_s: float = 0.1) -> Iterator[PowerLog]:
    """Read ``source`` in a thread of its own while the block runs."""
    log, done = PowerLog(source.name), threading.Event()

    def read() -> None:
        while not done.wait(interval_s):
            if reading := source.watts():
                log.readings.append(reading)

    source.watts()  # an energy counter starts here
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield log
    finally:
        done.set()
        thread.join()
