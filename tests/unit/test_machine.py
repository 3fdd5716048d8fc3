"""What a machine tells about itself, from files as Linux and JetPack write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgeseg.evaluate.latency.fresh import resident_bytes
from edgeseg.machine.record import MachineState
from edgeseg.machine.state import Counters, describe_machine, machine_flags, machine_state, read_counters

TICKS = os.sysconf("SC_CLK_TCK")


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    put(tmp_path / "proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\x00")
    put(tmp_path / "proc/loadavg", "0.52 0.58 0.59 1/467 12345\n")
    put(tmp_path / "proc/meminfo", "MemTotal:        7802744 kB\nMemAvailable:    5321000 kB\n")
    for core, khz in enumerate((729600, 1510400, 1510400)):
        put(tmp_path / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", f"{khz}\n")
    put(tmp_path / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "schedutil\n")
    put(tmp_path / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq", "1510400\n")
    for zone, (kind, milli_c) in enumerate((("cpu-thermal", "48593"), ("cv0-thermal", "-256000"))):
        put(tmp_path / f"sys/class/thermal/thermal_zone{zone}/type", kind + "\n")
        put(tmp_path / f"sys/class/thermal/thermal_zone{zone}/temp", milli_c + "\n")
    put(tmp_path / "var/lib/nvpmodel/status", "pmode:0001 fmode:fanNull\n")
    put(
        tmp_path / "etc/nv_tegra_release",
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    )
    put(tmp_path / "etc/nvpmodel.conf", "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n")
    return tmp_path


def test_state_and_description_of_a_jetson(jetson: Path) -> None:
    state = machine_state(jetson)
    assert state.cpu_mhz == (729.6, 1510.4, 1510.4)
    assert state.temperatures_c == {"cpu-thermal": 48.593}  # a sensor that is off is left out
    assert state.load == (0.52, 0.58, 0.59)
    machine = describe_machine(state, state, jetson)
    assert machine.device == "NVIDIA Jetson Orin Nano Developer Kit"
    assert (machine.governor, machine.cpu_max_mhz, machine.power_mode) == ("schedutil", 1510.4, "25W")
    assert machine.memory_bytes == 7802744 * 1024
    assert machine.jetpack == "L4T 36.4.3"
    packages = ("nvidia-jetpack-runtime\nVersion: 1\n", "nvidia-jetpack\nStatus: ok\nVersion: 6.2+b77\n", "z\n")
    put(jetson / "var/lib/dpkg/status", "\n".join(f"Package: {package}" for package in packages))
    assert describe_machine(state, state, jetson).jetpack == "6.2+b77 (L4T 36.4.3)"


def test_an_empty_machine_tells_nothing(tmp_path: Path) -> None:
    assert machine_state(tmp_path) == MachineState()
    machine = describe_machine(MachineState(), MachineState(), tmp_path)
    assert (machine.governor, machine.power_mode, machine.board, machine.jetpack) == (None, None, None, None)
    counters = read_counters(tmp_path)
    assert (counters.busy_s, counters.thermal, counters.quota_s) == (None, None, None)
    assert machine_flags(counters, read_counters(tmp_path)) == ()


def test_counters(tmp_path: Path) -> None:
    put(tmp_path / "proc/stat", f"cpu  {3 * TICKS} 0 {TICKS} 900 50 0 {TICKS} 0 7 0\ncpu0 1 2 3 4\n")
    put(tmp_path / "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", "3\n")
    put(tmp_path / "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count", "4\n")
    put(tmp_path / "sys/fs/cgroup/cpu.stat", "usage_usec 5\nthrottled_usec 1500000\n")
    counters = read_counters(tmp_path)
    assert (counters.busy_s, counters.thermal, counters.quota_s) == (5.0, 7, 1.5)


@pytest.mark.parametrize(
    ("after", "kinds"),
    [
        (Counters(10.0, 30.0, 22.0, 0, 0.0), []),  # 20 s busy, 20 s ours
        (Counters(10.0, 36.0, 22.0, 0, 0.0), ["other-load"]),  # 6 s of others in 10 s
        (Counters(10.0, 30.0, 22.0, 2, 0.0), ["throttled"]),
        (Counters(10.0, 30.0, 22.0, 0, 0.4), ["throttled"]),
        (Counters(10.0, 30.0, 22.0, 0, 0.0, 9), ["throttled"]),
    ],
)
def test_what_the_machine_says_against_a_run(after: Counters, kinds: list[str]) -> None:
    assert [f.kind for f in machine_flags(Counters(0.0, 10.0, 2.0, 0, 0.0, 7), after)] == kinds


def test_a_machine_that_holds_its_clocks_back_says_why(jetson: Path) -> None:
    devices = (("pwm-fan", 3), ("gpu-throttle-alert", 1), ("cpu-throttle-alert", 0), ("devfreq-gpu-gpc-0", 18))
    for index, (kind, state) in enumerate(devices):
        put(jetson / f"sys/class/thermal/cooling_device{index}/type", kind + "\n")
        put(jetson / f"sys/class/thermal/cooling_device{index}/cur_state", f"{state}\n")
    put(jetson / "sys/class/devfreq/17000000.gpu/cur_freq", "918000000\n")
    put(jetson / "sys/class/devfreq/15340000.vic/cur_freq", "115200000\n")
    for index, count in ((1, 0), (2, 8), (3, 813)):
        put(jetson / f"sys/class/hwmon/hwmon3/oc{index}_event_cnt", f"{count}\n")
    state = machine_state(jetson)
    assert state.gpu_mhz == {"17000000.gpu": 918.0}
    assert state.throttled == ("gpu-throttle-alert",)
    assert read_counters(jetson).overcurrent == 821
    still = Counters(0.0, None, 0.0)
    (flag,) = machine_flags(still, still, (MachineState(), state))
    assert (flag.kind, flag.detail) == ("throttled", "held back at the end of the run: gpu-throttle-alert")


def test_a_raspberry_pi_says_why_it_is_slow(tmp_path: Path) -> None:
    # Under-voltage and throttled now; bits 16 on are what happened since boot.
    put(tmp_path / "sys/devices/platform/soc/soc:firmware/get_throttled", "50005\n")
    assert machine_state(tmp_path).throttled == ("under-voltage", "throttled")
    put(tmp_path / "sys/devices/platform/soc/soc:firmware/get_throttled", "50000\n")
    assert machine_state(tmp_path).throttled == ()


def test_a_changed_clock_is_seen() -> None:
    slow, fast = MachineState(cpu_mhz=(729, 730, 800)), MachineState(cpu_mhz=(1500, 1510, 1510))
    still = Counters(0.0, None, 0.0)
    (flag,) = machine_flags(still, still, (slow, fast))
    assert flag.kind == "frequency"
    assert "730 to 1510 MHz" in flag.detail
    assert machine_flags(still, still, (fast, fast)) == ()


def test_resident_memory(tmp_path: Path) -> None:
    put(tmp_path / "status", "Name:\tpython\nVmHWM:\t   81234 kB\nVmRSS:\t   70000 kB\n")
    assert resident_bytes("VmHWM", tmp_path / "status") == 81234 * 1024
    assert resident_bytes("VmSwap", tmp_path / "status") is None
    assert resident_bytes("VmRSS", tmp_path / "missing") is None
