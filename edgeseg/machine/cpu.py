"""What the CPU at hand can do, as far as INT8 kernels care."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from edgeseg.machine.reading import read_text

# Linux names in /proc/cpuinfo; the ones that change which kernels a CPU backend picks.
_X86_FLAGS = ("avx2", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
_ARM_FLAGS = ("asimddp", "i8mm", "asimdhp", "sve")
# The same as (entry of the auxiliary vector, bit): AT_HWCAP is 16, AT_HWCAP2 26; Linux, arch/arm64/include/uapi/asm/hwcap.h.
_AARCH64_BITS = {"asimdhp": (16, 10), "asimddp": (16, 20), "sve": (16, 22), "i8mm": (26, 13)}


@dataclass(frozen=True)
class Cpu:
    """The processor this process runs on.

    Attributes:
        name: marketing name, or the machine type when the system does not tell.
        arch: ``x86``, ``arm`` or ``other``.
        flags: instruction-set extensions that matter for INT8, sorted; empty when the system does not tell.
        cores: logical CPUs this process may use.
    """

    name: str
    arch: str
    flags: tuple[str, ...]
    cores: int

    @property
    def has_vnni(self) -> bool:
        """Whether u8 x s8 dot products accumulate in 32 bits, so that no weights can saturate them."""
        return "avx512_vnni" in self.flags or "avx_vnni" in self.flags

    def computes(self, scheme: str | None) -> bool:
        """Whether the kernels of ONNX Runtime and OpenVINO for this CPU compute a graph of ``scheme`` as it is meant.

        Without VNNI sums of two 8-bit products saturate: the masks would be wrong, not just slow. A scheme of another
        architecture runs in float.
        """
        fits = {
            "onnxruntime-vnni": self.arch != "arm" and self.has_vnni,
            "onnxruntime-avx2": self.arch != "arm",
            "onnxruntime-arm": self.arch == "arm",
            "openvino-avx2": True,
        }
        return scheme is None or fits.get(scheme, self.arch == "arm" or self.has_vnni)

    @property
    def isa(self) -> str:
        """Architecture and flags in one word list, for manifests: an engine tuned on one does not fit another."""
        return " ".join((self.arch, *self.flags))


@functools.cache
def this_cpu() -> Cpu:
    """Describe the CPU at hand (read once). Under user-mode emulation it is the emulated one, and the name says so."""
    machine = platform.machine().lower()
    arch = (
        "x86" if machine in {"x86_64", "amd64", "i686"} else "arm" if machine.startswith(("arm", "aarch")) else "other"
    )
    text = read_text(Path("/proc/cpuinfo")) or ""
    name, flags = parse_cpuinfo(text, arch)
    if is_emulated(text, arch):
        # QEMU passes the host's file on: nothing in it but the host's name is of use.
        name = f"{machine}, emulated on {name}" if name else f"{machine}, emulated"
        flags = _aarch64_flags() if machine == "aarch64" else ()
    return Cpu(name or platform.processor() or machine, arch, flags, _usable_cores())


def parse_cpuinfo(text: str, arch: str) -> tuple[str, tuple[str, ...]]:
    """Return (name, flags that matter) from the text of Linux's ``/proc/cpuinfo``."""
    fields = _fields(text)
    words = set((fields.get("flags") or fields.get("features") or "").split())
    wanted = _X86_FLAGS if arch == "x86" else _ARM_FLAGS
    return fields.get("model name", ""), tuple(sorted(words.intersection(wanted)))


def is_emulated(text: str, arch: str) -> bool:
    """Whether the text of ``/proc/cpuinfo`` describes a CPU of another architecture than ``arch``."""
    fields = _fields(text)
    # Of an x86 CPU the file names the vendor, of an ARM CPU the implementer.
    described = {"x86": "vendor_id" in fields, "arm": "cpu implementer" in fields}
    return any(described.values()) and not described.get(arch, True)


def _fields(text: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    return fields


def _aarch64_flags() -> tuple[str, ...]:
    """The flags that the kernel, or the emulator in its place, gives every process."""
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.argtypes, getauxval.restype = (ctypes.c_ulong,), ctypes.c_ulong
    return tuple(sorted(flag for flag, (entry, bit) in _AARCH64_BITS.items() if getauxval(entry) >> bit & 1))


def _usable_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
