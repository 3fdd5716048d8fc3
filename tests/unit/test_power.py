"""Power meters: lines and files as real devices wrote them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeseg.machine.nvml import NvmlSource, gpu_bytes, nvml_gpus, nvml_state
from edgeseg.machine.power import (
    InaSource,
    PowerLog,
    RaplSource,
    TegrastatsSource,
    find_source,
    parse_tegrastats,
    power_log,
    read_ina3221,
    total_power,
)
from edgeseg.machine.record import MachineState

# Recorded by users of the devices and published in their repositories; load figures shortened.
NANO_JETPACK4 = (
    "RAM 1655/3956MB (lfb 311x4MB) SWAP 0/1978MB (cached 0MB) IRAM 0/252kB(lfb 252kB) CPU [12%@102,10%@102,11%@102,12%@102] "
    "EMC_FREQ 3%@1600 GR3D_FREQ 0%@76 APE 25 PLL@36.5C CPU@39C iwlwifi@44C PMIC@50C GPU@37C AO@47.5C thermal@38C "
    "POM_5V_IN 2132/2132 POM_5V_GPU 78/78 POM_5V_CPU 275/275"
)
XAVIER_JETPACK4 = (
    "SWAP 0/15959MB (cached 0MB) CPU [17%@1190,17%@1190] EMC_FREQ 55%@2133 GR3D_FREQ 95%@1377 APE 150 MTS fg 0% bg 10% "
    "AO@48C GPU@54.5C Tdiode@53.25C PMIC@100C AUX@46C CPU@49C thermal@49.45C Tboard@47C GPU 18401/18525 CPU 2301/2330 "
    "SOC 4602/4602 CV 0/0 VDDRQ 2914/2911 SYS5V 4632/4620"
)
XAVIER_JETPACK5 = (
    "[0%@1190,1%@1190] EMC_FREQ 0%@1331 GR3D_FREQ 0%@114 VIC_FREQ 115 APE 150 AUX@36C CPU@36.5C thermal@35.7C GPU@35C "
    "GPU 467mW/467mW CPU 467mW/467mW SOC 1245mW/1245mW CV 0mW/0mW VDDRQ 311mW/311mW SYS5V 2768mW/2768mW"
)
AGX_ORIN_JETPACK5 = (
    "10-16-2023 10:59:22 RAM 1206/30623MB (lfb 6429x4MB) SWAP 0/15311MB (cached 0MB) CPU [0%@729,0%@729] EMC_FREQ 0%@204 "
    "GR3D_FREQ 0%@114 NVJPG1 729 VIC_FREQ 729 APE 233 CV0@-256C CPU@43.5C Tdiode@32.5C SOC2@40.062C GPU@38.156C "
    "VDD_GPU_SOC 4788mW/4788mW VDD_CPU_CV 798mW/798mW VIN_SYS_5V0 3842mW/3842mW NC 0mW/0mW VDDQ_VDD2_1V8AO 707mW/707mW "
    "NC 0mW/0mW"
)
AGX_ORIN_JETPACK6 = (
    "03-17-2024 18:54:10 RAM 10239/62841MB (lfb 442x4MB) SWAP 1/31421MB (cached 0MB) CPU [0%@1728,off,off] GR3D_FREQ 0% "
    "cpu@37.5C tboard@27C soc2@34.562C tj@37.5C VDD_GPU_SOC 1592mW/1592mW VDD_CPU_CV -398mW/-398mW "
    "VIN_SYS_5V0 2624mW/2624mW VDDQ_VDD2_1V8AO 403mW/403mW"
)
ORIN_NANO_JETPACK6 = "GR3D_FREQ 0% VDD_IN 3325mW/3325mW VDD_CPU_GPU_CV 560mW/560mW VDD_SOC 1080mW/1080mW"
TX2_JETPACK4 = (
    "RAM 1404/7860MB (lfb 236x4MB) SWAP 0/3930MB (cached 0MB) CPU [0%@345,off,off,0%@345] EMC_FREQ 0% GR3D_FREQ 0% "
    "PLL@35.5C MCPU@35.5C PMIC@100C Tboard@30C GPU@32C BCPU@35.5C thermal@34.1C Tdiode@31.5C VDD_SYS_GPU 153/153 "
    "VDD_SYS_SOC 306/306 VDD_4V0_WIFI 0/0 VDD_IN 1649/1649 VDD_SYS_CPU 306/306 VDD_SYS_DDR 173/173"
)
AGX_ORIN_JETPACK7 = (
    "07-17-2026 15:15:24 RAM 8182/62817MB (lfb 6x4MB) CPU [18%@729,12%@729] GR3D_FREQ 0%@[1300,1300] "
    "cpu@51.343C/51.343C soc2@48.843C/48.843C gpu@46.843C/46.843C tj@51.343C/51.343C VDD_GPU_SOC 3588mW/3588mW/3588mW "
    "VDD_CPU_CV 797mW/797mW/797mW VIN_SYS_5V0 5148mW/5148mW/5148mW"
)
THOR_JETPACK7_0 = (
    "04-21-2026 15:50:52 RAM 105265/125772MB (lfb 34x4MB) CPU [0%@972,8%@972] EMC_FREQ 0%@2750 GR3D_FREQ @[314,314,314] "
    "NVENC0_FREQ @314 VIC off PVA0_FREQ off APE 300 cpu@37.343C tj@38.875C soc012@37.468C gpu@38.875C "
    "VDD_GPU -392mW/-392mW VDD_CPU_SOC_MSS 5887mW/5887mW VIN_SYS_5V0 5635mW/5635mW VIN 19780mW/19780mW"
)
THOR_JETPACK7_2 = (
    "07-02-2026 13:45:44 RAM 36529/125749MB (lfb 12x4MB) SWAP 11/4096MB (cached 9MB) CPU [2%@972,1%@972] cpu@60.406C "
    "tj@63.281C soc012@58.468C gpu@62.906C VDD_GPU 37528mW/37528mW/37528mW VDD_CPU_SOC_MSS 18961mW/18961mW/18961mW "
    "VIN_SYS_5V0 18331mW/18331mW/18331mW VIN 87426mW/43713mW/87426mW"
)
THOR_VALUES_ALONE = "gpu@43.968C VDD_GPU 5517mW VDD_CPU_SOC_MSS 7484mW VIN_SYS_5V0 6309mW VIN 28548mW"


@pytest.mark.parametrize(
    ("line", "rails", "total"),
    [
        (NANO_JETPACK4, {"POM_5V_IN": 2.132, "POM_5V_GPU": 0.078, "POM_5V_CPU": 0.275}, 2.132),
        (
            XAVIER_JETPACK4,
            {"GPU": 18.401, "CPU": 2.301, "SOC": 4.602, "CV": 0.0, "VDDRQ": 2.914, "SYS5V": 4.632},
            32.85,
        ),
        (
            XAVIER_JETPACK5,
            {"GPU": 0.467, "CPU": 0.467, "SOC": 1.245, "CV": 0.0, "VDDRQ": 0.311, "SYS5V": 2.768},
            5.258,
        ),
        (
            AGX_ORIN_JETPACK5,
            {"VDD_GPU_SOC": 4.788, "VDD_CPU_CV": 0.798, "VIN_SYS_5V0": 3.842, "VDDQ_VDD2_1V8AO": 0.707},
            9.428,  # the memory rail is fed by the 5 V rail and must not count twice
        ),
        (
            AGX_ORIN_JETPACK6,
            {"VDD_GPU_SOC": 1.592, "VDD_CPU_CV": -0.398, "VIN_SYS_5V0": 2.624, "VDDQ_VDD2_1V8AO": 0.403},
            3.818,
        ),
        (ORIN_NANO_JETPACK6, {"VDD_IN": 3.325, "VDD_CPU_GPU_CV": 0.56, "VDD_SOC": 1.08}, 3.325),
        (
            TX2_JETPACK4,
            {
                "VDD_SYS_GPU": 0.153,
                "VDD_SYS_SOC": 0.306,
                "VDD_4V0_WIFI": 0.0,
                "VDD_IN": 1.649,
                "VDD_SYS_CPU": 0.306,
                "VDD_SYS_DDR": 0.173,
            },
            1.649,
        ),
        (AGX_ORIN_JETPACK7, {"VDD_GPU_SOC": 3.588, "VDD_CPU_CV": 0.797, "VIN_SYS_5V0": 5.148}, 9.533),
        (
            THOR_JETPACK7_0,
            {"VDD_GPU": -0.392, "VDD_CPU_SOC_MSS": 5.887, "VIN_SYS_5V0": 5.635, "VIN": 19.78},
            19.78,
        ),
        (
            THOR_JETPACK7_2,  # the present value, not the mean (43.7) beside it
            {"VDD_GPU": 37.528, "VDD_CPU_SOC_MSS": 18.961, "VIN_SYS_5V0": 18.331, "VIN": 87.426},
            87.426,
        ),
        (THOR_VALUES_ALONE, {"VDD_GPU": 5.517, "VDD_CPU_SOC_MSS": 7.484, "VIN_SYS_5V0": 6.309, "VIN": 28.548}, 28.548),
    ],
    ids=[
        "nano", "xavier-4", "xavier-5", "agx-orin-5", "agx-orin-6", "orin-nano-6", "tx2-4", "agx-orin-7", "thor-7.0",
        "thor-7.2", "thor-values-alone",
    ],
)  # fmt: skip
def test_tegrastats(line: str, rails: dict[str, float], total: float) -> None:
    assert parse_tegrastats(line) == pytest.approx(rails)
    watts, covers = total_power("tegrastats", parse_tegrastats(line))
    assert watts == pytest.approx(total)
    assert "VDDQ_VDD2" not in covers


def test_a_line_without_rails_has_no_power() -> None:
    assert parse_tegrastats("RAM 2893/3956MB (lfb 5x2MB) SWAP 233/1978MB CPU [21%@102] EMC_FREQ 0% CPU@20.5C") == {}
    with pytest.raises(ValueError, match="no rails"):
        total_power("tegrastats", {})


def put(root: Path, **files: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name).write_text(text + "\n")
    return root


def test_ina3221_of_jetpack_4(tmp_path: Path) -> None:
    chip = tmp_path / "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    put(chip, rail_name_0="POM_5V_IN", in_power0_input="2875", rail_name_1="POM_5V_GPU", in_power1_input="78")
    (chip.parent / "iio_device").symlink_to(chip.name)
    assert read_ina3221(tmp_path) == pytest.approx({"POM_5V_IN": 2.875, "POM_5V_GPU": 0.078})


def test_ina3221_of_jetpack_5_and_6(tmp_path: Path) -> None:
    chip = tmp_path / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
    put(chip, in1_label="VDD_IN", in1_input="4952", curr1_input="1088", in2_label="NC", in2_input="0", curr2_input="0")
    assert read_ina3221(tmp_path) == pytest.approx({"VDD_IN": 4.952 * 1.088})


def test_ina238_of_jetpack_7(tmp_path: Path) -> None:
    put(tmp_path / "sys/bus/i2c/drivers/ina238/2-0044/hwmon/hwmon4", power1_input="23500000")
    assert total_power("ina3221", read_ina3221(tmp_path))[0] == pytest.approx(23.5)


def test_unreadable_files_are_no_power(tmp_path: Path) -> None:
    chip = tmp_path / "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    put(chip, rail_name_0="POM_5V_IN", in_power0_input="garbage")
    assert read_ina3221(tmp_path) == {}


def rapl(root: Path, microjoules: int) -> None:
    zone = "sys/class/powercap/intel-rapl:0"
    put(root / zone, name="package-0", energy_uj=str(microjoules), max_energy_range_uj="1000000")
    put(root / f"{zone}:0", name="core", energy_uj="5")
    put(root / "sys/class/powercap/intel-rapl:1", name="psys", energy_uj="5")


def test_rapl_counts_packages_and_wraps(tmp_path: Path) -> None:
    now = iter([0.0, 2.0, 4.0])
    rapl(tmp_path, 100_000)
    source = RaplSource(tmp_path, clock=lambda: next(now))
    rapl(tmp_path, 700_000)
    assert source.watts() == pytest.approx({"package-0": 0.3})
    rapl(tmp_path, 100_000)  # past its range of 1 J: 0.3 J to the end and 0.1 J since
    assert source.watts() == pytest.approx({"package-0": 0.2})
    assert total_power("rapl", {"package-0": 0.2}) == (0.2, "package-0: CPU package only")


def test_rapl_that_only_root_may_read_is_no_source(tmp_path: Path) -> None:
    put(tmp_path / "sys/class/powercap/intel-rapl:0", name="package-0")
    assert not RaplSource(tmp_path).is_readable
    assert find_source(tmp_path, nvml=fake_nvml(available=False)) is None


class NvmlError(Exception):
    pass


def fake_nvml(available: bool = True, metered: bool = True) -> Any:
    def raising(*_: object) -> None:
        raise NvmlError

    def nothing(*_: object) -> None:
        return None

    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=nothing if available else raising,
        nvmlShutdown=nothing,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetPowerUsage=(lambda gpu: 61_500) if metered else raising,
        nvmlSystemGetDriverVersion=lambda: b"550.54",
        nvmlDeviceGetEnforcedPowerLimit=(lambda gpu: 70_000) if metered else raising,
        nvmlDeviceGetMemoryInfo=(lambda gpu: SimpleNamespace(total=16 << 30)) if metered else raising,
        nvmlDeviceGetName=lambda gpu: "Tesla T4",
        nvmlDeviceGetClockInfo=(lambda gpu, clock: 1590) if metered else raising,
        nvmlDeviceGetTemperature=lambda gpu, sensor: 71,
        nvmlDeviceGetCurrentClocksThrottleReasons=(lambda gpu: 0x1 | 0x4 | 0x20) if metered else raising,
        nvmlDeviceGetComputeRunningProcesses=lambda gpu: [
            SimpleNamespace(pid=7, usedGpuMemory=300),
            SimpleNamespace(pid=8, usedGpuMemory=None),
        ],
    )


def test_nvml() -> None:
    assert NvmlSource(fake_nvml()).watts() == {"GPU 0": 61.5}
    assert NvmlSource(fake_nvml(metered=False)).watts() == {}
    (gpu,) = nvml_gpus(fake_nvml())
    assert (gpu.name, gpu.memory_bytes, gpu.driver, gpu.power_limit_w) == ("Tesla T4", 16 << 30, "550.54", 70.0)
    # GPUs that share the host's memory (Thor, GB10) tell neither their memory nor a power limit.
    (gpu,) = nvml_gpus(fake_nvml(metered=False))
    assert (gpu.name, gpu.memory_bytes, gpu.driver, gpu.power_limit_w) == ("Tesla T4", None, "550.54", None)
    assert nvml_gpus(fake_nvml(available=False)) == ()


def test_nvml_state_and_memory_of_a_process() -> None:
    assert nvml_state(fake_nvml()) == MachineState(
        gpu_mhz={"GPU 0": 1590.0},
        temperatures_c={"GPU 0": 71.0},
        throttled=("GPU 0: power cap", "GPU 0: software thermal slowdown"),
    )
    assert nvml_state(fake_nvml(metered=False)) == MachineState(temperatures_c={"GPU 0": 71.0})
    assert nvml_state(fake_nvml(available=False)) == MachineState()
    assert [gpu_bytes(pid, fake_nvml()) for pid in (7, 8, 9)] == [300, None, None]
    assert gpu_bytes(7, fake_nvml(available=False)) is None


def test_the_source_that_answers_is_taken(tmp_path: Path) -> None:
    source = find_source(tmp_path, nvml=fake_nvml())
    assert source is not None
    assert source.name == "nvml"
    rapl(tmp_path, 1)
    assert getattr(find_source(tmp_path, nvml=fake_nvml(metered=False)), "name", None) == "rapl"
    put(tmp_path / "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0", rail_name_0="VDD_IN", in_power0_input="5000")
    assert getattr(find_source(tmp_path, nvml=fake_nvml()), "name", None) == "ina3221"


def test_a_running_tegrastats_is_read_and_ended(tmp_path: Path) -> None:
    program = tmp_path / "tegrastats"
    program.write_text(f"#!{sys.executable}\nimport time\nprint({ORIN_NANO_JETPACK6!r}, flush=True)\ntime.sleep(60)\n")
    program.chmod(0o755)
    source = find_source(tmp_path, tegrastats=str(program))
    assert isinstance(source, TegrastatsSource)
    assert source.watts()["VDD_IN"] == 3.325
    source.close()
    assert source._process.returncode is not None


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        (None, 0, "No such file or directory"),
        ("echo", 0o644, "Permission denied"),
        ("no program", 0o755, "Exec format error"),
        ("#!/no/such/interpreter\n", 0o755, "No such file or directory"),
    ],
)
def test_a_tegrastats_that_cannot_start_is_said_and_the_next_source_is_taken(
    tmp_path: Path, content: str | None, mode: int, reason: str
) -> None:
    program, said = tmp_path / "tegrastats", list[str]()
    if content is not None:
        program.write_text(content)
        program.chmod(mode)
    source = find_source(tmp_path, nvml=fake_nvml(), tegrastats=str(program), say=said.append)
    assert source is not None and source.name == "nvml"
    assert said == [f"{program} cannot be started ({reason}): its power rails are not read"]


def test_a_tegrastats_that_ended_tells_nothing_more(tmp_path: Path) -> None:
    program = tmp_path / "tegrastats"
    program.write_text("#!/bin/sh\nprintf '\\377 VDD_IN 3325mW/3325mW\\n'\nread line\n")
    program.chmod(0o755)
    source = TegrastatsSource(str(program))
    wait_for(lambda: source._process.poll() is not None)
    source._thread.join()
    assert source.watts() == {}
    source.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_energy_per_image_is_power_over_throughput(tmp_path: Path) -> None:
    put(tmp_path / "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0", rail_name_0="VDD_IN", in_power0_input="7500")
    with power_log(InaSource(tmp_path), interval_s=0.001) as log:
        wait_for(lambda: len(log.readings) >= 3)
    power = log.result(images_per_s=30.0, idle_w=5.0)
    assert power is not None
    assert (power.mean_w, power.energy_per_image_j, power.idle_w) == (7.5, 0.25, 5.0)
    assert power.readings >= 3
    assert PowerLog("nvml").result(30.0) is None
