"""Other CPUs under QEMU's user-mode emulation: an ARM machine, and this one's Python on a CPU with AVX2 alone.

The ARM machine is Debian's arm64 Python, aarch64 wheels, and edgeseg as a wheel. Kernels and numerics are those of the CPU;
times mean nothing. All of it lies in one folder, nothing is installed on this machine. Needs apt-get with Debian's packages (for
ARM: for arm64), dpkg-deb, pip and their indexes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ONNXRUNTIME = "1.27.0"
"""ONNX Runtime on that machine: the import of 1.31 ends in an illegal instruction under QEMU 7.2, Debian 12's."""

_APT = """APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
APT::Sandbox::User "root";
APT::Install-Recommends "false";
Dir::State "{folder}/apt/state";
Dir::State::status "{folder}/apt/state/status";
Dir::Cache "{folder}/apt/cache";
"""
_PACKAGES = ("python3", "libstdc++6", "libgomp1")
_PYTHON = """#!/bin/sh
# Python's own name for itself (-0) is this file, so that a process it starts is emulated too.
# EDGESEG_ARM_CPU: one of QEMU's CPUs.
exec env PYTHONHOME={folder}/root/usr PYTHONPATH={folder}/project:{folder}/packages \\
    {folder}/usr/bin/qemu-aarch64-static -cpu ${{EDGESEG_ARM_CPU:-max}} -0 "$0" -L {folder}/root \\
    {folder}/root/usr/bin/{python} "$@"
"""


class CannotEmulateError(Exception):
    """Why there is no emulated machine."""


@dataclass(frozen=True)
class ArmMachine:
    """A folder with an aarch64 Python that has edgeseg and ONNX Runtime."""

    folder: Path

    def python(
        self, *arguments: str | Path, folder: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the emulated Python in ``folder``; the caller looks at the exit code."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [self.folder / "python", *arguments],
            cwd=folder,
            env={**kept, "EDGESEG_CACHE": str(folder / "cache"), "COLUMNS": "80", **(environment or {})},
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )


def prepare(folder: Path) -> ArmMachine:
    """Make the machine in ``folder``, or what of it is not there yet; edgeseg's wheel is always built anew.

    Raises:
        CannotEmulateError: with the reason.
    """
    wanted = hashlib.sha256(Path(__file__).read_bytes() + (ROOT / "pyproject.toml").read_bytes()).hexdigest()
    stamp = folder / "made-from"
    if not stamp.is_file() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _emulator(folder, "qemu-aarch64-static")
        python = _arm_python(folder)
        _pip_for_arm(
            python, folder / "packages", f"{_wheel(folder)}[onnxruntime,report]", f"onnxruntime=={ONNXRUNTIME}"
        )
        shutil.rmtree(next((folder / "packages").glob("edgeseg")))
        script = folder / "python"
        script.write_text(_PYTHON.format(folder=folder, python=python))
        script.chmod(0o755)
        stamp.write_text(wanted)
    shutil.rmtree(folder / "project", ignore_errors=True)
    _pip_for_arm((folder / "root/usr/bin/python3").resolve().name, folder / "project", "--no-deps", str(_wheel(folder)))
    return ArmMachine(folder)


def emulated_avx2(folder: Path) -> tuple[str, ...]:
    """The command that runs this Python on an x86 CPU with AVX2 and neither AVX-512 nor VNNI (Intel's Haswell, 2013).

    ``/proc/cpuinfo`` is this machine's there: what runs on it has to be told what the CPU is.

    Raises:
        CannotEmulateError: with the reason.
    """
    name = "qemu-x86_64-static"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "usr/bin" / name).is_file():
        _emulator(folder, name)
    return (str(folder / "usr/bin" / name), "-cpu", "Haswell", sys.executable)


def _emulator(folder: Path, name: str) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise CannotEmulateError(f"no {tool}: the emulator is a Debian package")
    _run("apt-get", "-qq", "download", "qemu-user-static", folder=folder)
    archive = next(folder.glob("qemu-user-static_*.deb"))
    packed = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", folder, f"./usr/bin/{name}"], input=packed, check=True)
    archive.unlink()


def _arm_python(folder: Path) -> str:
    """Unpack the ARM Python into ``root`` with a list of packages of its own; its file's name, such as ``python3.11``."""
    for part in ("apt/state/lists/partial", "apt/cache/archives/partial", "root"):
        (folder / part).mkdir(parents=True)
    (folder / "apt/state/status").touch()
    (folder / "apt/conf").write_text(_APT.format(folder=folder))
    apt = {"APT_CONFIG": str(folder / "apt/conf")}
    _run("apt-get", "-qq", "update", folder=folder, environment=apt)
    _run("apt-get", "-qq", "-y", "--download-only", "install", *_PACKAGES, folder=folder, environment=apt)
    for archive in sorted((folder / "apt/cache/archives").glob("*.deb")):
        _run("dpkg-deb", "-x", str(archive), str(folder / "root"), folder=folder)
    shutil.rmtree(folder / "apt")
    return (folder / "root/usr/bin/python3").resolve().name


def _wheel(folder: Path) -> Path:
    shutil.rmtree(folder / "wheel", ignore_errors=True)
    _run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder / "wheel"), str(ROOT), folder=folder)
    return next((folder / "wheel").glob("edgeseg-*.whl"))


def _pip_for_arm(python: str, target: Path, *what: str) -> None:
    _run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        *for_arm(python),
        "--target",
        str(target),
        *what,
        folder=target.parent,
    )


def for_arm(python: str) -> tuple[str, ...]:
    """pip's options for wheels that run on an aarch64 Linux of glibc 2.28 or later with ``python3.11`` or the like."""
    platforms = ("manylinux_2_28", "manylinux_2_27", "manylinux2014", "manylinux_2_17")
    return (
        *(f"--platform={platform}_aarch64" for platform in platforms),
        f"--python-version={python.removeprefix('python')}",
        "--implementation=cp",
        "--only-binary=:all:",
    )


def _run(*command: str, folder: Path, environment: Mapping[str, str] | None = None) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise CannotEmulateError(f"{command[0]} did not end within {exc.timeout:.0f} s") from exc
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no message"]
        raise CannotEmulateError(f"{' '.join(command[:3])} failed: {said[-1]}")
