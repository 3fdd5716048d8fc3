"""The doctor on machines it has never seen: recorded files of containers and boards, and CPUs made up from flags."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from edgeseg.backends import BACKENDS, BackendStatus
from edgeseg.cli.doctor import FEATURES, Diagnosis, Package, advise, diagnose, render, torch_cuda, torch_line
from edgeseg.machine.cpu import Cpu
from edgeseg.machine.packages import EXTRAS
from edgeseg.machine.reading import Memory, core_limit, memory_limit_bytes, read_memory

PLENTY = Memory(8 << 30, 6 << 30, None)
WORKS = {"onnxruntime": BackendStatus(True, "1.31.1", "fine")}
ALL = tuple(Package(name, "1.0", extra) for extra, names in EXTRAS.items() for name in names)


def cpu(arch: str, *flags: str, cores: int = 4) -> Cpu:
    return Cpu("Some CPU", arch, tuple(sorted(flags)), cores)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("machine", "first"),
    [
        (cpu("x86", "avx2", "avx512_vnni", "avx_vnni"), "int8 is the fast precision here: AVX512-VNNI"),
        (cpu("x86", "avx2", "avx_vnni"), "int8 is the fast precision here: AVX-VNNI"),
        (cpu("x86", "avx2"), "AVX2 adds pairs of int8 products in 16 bits, so neighbouring weights"),
        (cpu("x86"), "Nothing is known about this CPU's int8 instructions"),
        (cpu("arm", "asimddp"), "s8 activations with s8 weights"),
        (cpu("arm", "i8mm"), "s8 activations with s8 weights"),
        (cpu("arm"), "int8 gains little here"),
        (cpu("other"), "Nothing is known"),
    ],
)
def test_what_is_fast_follows_from_the_cpus_flags(machine: Cpu, first: str) -> None:
    assert first in advise(machine, None, PLENTY, ALL, WORKS)[0]


def test_a_complete_machine_gets_no_complaint() -> None:
    said = advise(cpu("x86", "avx512_vnni"), None, PLENTY, ALL, WORKS)
    assert len(said) == 2
    assert "fp16" in said[1]


def test_missing_extras_come_with_their_pip_line() -> None:
    lacking = tuple(p if p.name != "torch" else Package("torch", None, "convert") for p in ALL)
    said = advise(cpu("arm", "asimddp"), None, PLENTY, lacking, WORKS)
    assert "Engines can run here but not be built (no torch): pip install 'edgeseg[convert]'." in said
    none = {"onnxruntime": BackendStatus(False, None, "missing")}
    assert "No backend can run here: pip install 'edgeseg[onnxruntime]'." in advise(cpu("x86"), None, PLENTY, ALL, none)


def test_torch_and_torchvision_of_different_builds_are_found() -> None:
    def packages(torch: str, torchvision: str) -> tuple[Package, ...]:
        return (Package("torch", torch, "convert"), Package("torchvision", torchvision, "convert"))

    def complaints(torch: str, torchvision: str) -> list[str]:
        said = advise(cpu("x86"), None, PLENTY, packages(torch, torchvision), WORKS)
        return [s for s in said if "not a pair" in s]

    assert complaints("2.14.1+cpu", "0.29.1") != []
    assert complaints("2.14.1+cpu", "0.29.1+cpu") == complaints("2.14.1", "0.29.1") == []


def test_a_container_with_fewer_cpus_and_little_memory_is_told() -> None:
    said = advise(cpu("x86", cores=8), 1.5, Memory(8 << 30, 6 << 30, 512 << 20), ALL, WORKS)
    assert any("1.5 of 8 CPUs" in s and "threads=1" in s for s in said)
    assert any("512 MiB" in s for s in said)
    assert not any("CPUs at once" in s for s in advise(cpu("x86", cores=2), 2.0, PLENTY, ALL, WORKS))


def test_cpu_quota_of_cgroup_version_2_is_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    membership = write(tmp_path / "cgroup", "0::/kubepods/pod1/app\n")
    root = tmp_path / "fs"
    write(root / "cpu.max", "max 100000\n")
    assert core_limit(root, membership) is None
    write(root / "kubepods" / "pod1" / "cpu.max", "150000 100000\n")
    write(root / "kubepods" / "pod1" / "app" / "cpu.max", "max 100000\n")
    assert core_limit(root, membership) == 1.5
    write(root / "kubepods" / "pod1" / "memory.max", "1073741824\n")
    write(root / "kubepods" / "memory.max", "max\n")
    assert memory_limit_bytes(root, membership) == 1 << 30


def test_cpu_quota_of_cgroup_version_1(tmp_path: Path) -> None:
    membership = write(tmp_path / "cgroup", "4:cpu,cpuacct:/docker/abc\n7:memory:/docker/abc\n")
    root = tmp_path / "fs"
    group = root / "cpu" / "docker" / "abc"
    write(group / "cpu.cfs_quota_us", "-1\n")
    write(group / "cpu.cfs_period_us", "100000\n")
    assert core_limit(root, membership) is None
    write(group / "cpu.cfs_quota_us", "50000\n")
    assert core_limit(root, membership) == 0.5
    write(root / "memory" / "docker" / "abc" / "memory.limit_in_bytes", "9223372036854771712\n")
    assert memory_limit_bytes(root, membership) is None
    write(root / "memory" / "docker" / "abc" / "memory.limit_in_bytes", "268435456\n")
    assert memory_limit_bytes(root, membership) == 256 << 20


def test_a_machine_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert core_limit(tmp_path / "none", tmp_path / "none") is None
    assert memory_limit_bytes(tmp_path / "none", tmp_path / "none") is None


def test_memory_is_read_in_bytes_and_unknown_stays_unknown(tmp_path: Path) -> None:
    memory = read_memory(
        write(tmp_path / "meminfo", "MemTotal:       16000 kB\nMemFree: 1 kB\nMemAvailable:    9000 kB\n")
    )
    assert (memory.total_bytes, memory.available_bytes) == (16000 * 1024, 9000 * 1024)
    assert read_memory(tmp_path / "none").total_bytes is None


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    return diagnose()


def test_this_machine_can_be_diagnosed(diagnosis: Diagnosis) -> None:
    assert set(diagnosis.backends) == set(BACKENDS)
    assert all(status.detail for status in diagnosis.backends.values())
    assert set(diagnosis.features) == set(FEATURES.get(diagnosis.cpu.arch, {}))
    assert {p.name for p in diagnosis.packages} == {name for names in EXTRAS.values() for name in names}
    assert diagnosis.advice


def test_it_is_one_json_object_and_reads_in_a_narrow_terminal(diagnosis: Diagnosis) -> None:
    assert json.loads(msgspec.json.encode(diagnosis))["edgeseg_version"]
    console = Console(width=60)
    with console.capture() as capture:
        console.print(render(diagnosis))
    text = capture.get()
    assert all(len(line) <= 60 for line in text.splitlines())
    assert "onnxruntime" in text
    assert "*" in text


def test_torch_is_never_imported() -> None:
    code = "import sys; from edgeseg.cli.doctor import diagnose; diagnose(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_no_backend_leaves_anything_in_the_home_folder(tmp_path: Path) -> None:
    """ONNX Runtime and OpenVINO send usage data under an id they keep there, unless kept from it."""
    names = (
        "HOME",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "XDG_DATA_HOME",
        "CI",
        "ORT_DISABLE_TELEMETRY",
        "EDGESEG_CACHE",
    )
    environment = {name: value for name, value in os.environ.items() if name not in names}
    code = "from edgeseg.cli.doctor import diagnose; diagnose()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, "HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.rglob("*")) == []


def test_every_extra_is_listed_with_its_packages() -> None:
    import re

    import msgspec

    project = msgspec.toml.decode((Path(__file__).parents[2] / "pyproject.toml").read_bytes())["project"]
    wanted = {"base": project["dependencies"], **project["optional-dependencies"]}
    del wanted["dev"], wanted["docs"]
    names = {extra: {re.split("[<>=;]", line)[0].strip() for line in lines} for extra, lines in wanted.items()}
    # The TOML reader of Python 3.10; Python 3.11 has its own.
    names["base"].discard("tomli")
    assert {extra: set(packages) for extra, packages in EXTRAS.items()} == names


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("__version__ = '2.14.1+cu130'\ncuda: Optional[str] = '13.0'\n", "13.0"),
        ("cuda = '12.6'\n", "12.6"),
        ("cuda: Optional[str] = None\n", None),
        ("mycuda = '12.6'\n", None),
    ],
)
def test_what_pytorch_is_built_for_is_read_from_its_files(tmp_path: Path, text: str, cuda: str | None) -> None:
    write(tmp_path / "version.py", text)
    assert torch_cuda(tmp_path) == cuda


def test_what_pytorch_is_built_for_is_what_it_says_itself() -> None:
    code = "import torch; print(torch.version.cuda)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no torch")
    assert str(torch_cuda()) == done.stdout.strip()


def test_a_pytorch_that_cannot_be_the_baseline_of_a_gpu_is_said() -> None:
    gpu = {"tensorrt": BackendStatus(True, "10.3.0", "Orin")}
    assert not [line for line in advise(cpu("arm", "i8mm"), None, PLENTY, ALL, gpu, "12.6") if "CUDA" in line]
    assert not [line for line in advise(cpu("arm", "i8mm"), None, PLENTY, ALL, WORKS) if "CUDA" in line]
    (said,) = [line for line in advise(cpu("arm", "i8mm"), None, PLENTY, ALL, gpu) if "CUDA" in line]
    assert "no PyTorch to compare the GPU's engines with" in said and "--baseline pytorch-cpu" in said
    diagnosis = diagnose()
    lines = [torch_line(dataclasses.replace(diagnosis, packages=ALL, torch_cuda=c, backends=b)) for c, b in (
        (None, WORKS), ("12.6", WORKS), ("12.6", gpu), (None, gpu),
    )]  # fmt: skip
    assert lines == [
        "1.0, built without CUDA: runs on the CPU",
        "1.0, for CUDA 12.6: runs on the CPU",
        "1.0, for CUDA 12.6: GPU engines are compared on the GPU",
        "1.0, built without CUDA: runs on the CPU",
    ]
