"""What the CPU at hand can do, as far as INT8 kernels care."""

from __future__ import annotations

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
        """Whether u8 x s8 dot products accumulate in 32 bits, so that 8-bit weights cannot saturate."""
        return "avx512_vnni" in self.flags or "avx_vnni" in self.flags

    def computes(self, scheme: str | None) -> bool:
        """Whether the kernels of ONNX Runtime and OpenVINO for this CPU compute a graph of ``scheme`` as it is meant.

        Without VNNI the sums of 8-bit products saturate: the masks would be wrong, not just slow. A scheme of another
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
    """Describe the CPU at hand (read once)."""
    machine = platform.machine().lower()
    arch = (
        "x86" if machine in {"x86_64", "amd64", "i686"} else "arm" if machine.startswith(("arm", "aarch")) else "other"
    )
    text = read_text(Path("/proc/cpuinfo")) or ""
    name, flags = parse_cpuinfo(text, arch)
    return Cpu(name or platform.processor() or machine, arch, flags, _usable_cores())


def parse_cpuinfo(text: str, arch: str) -> tuple[str, tuple[str, ...]]:
    """Return (name, flags that matter) from the text of Linux's ``/proc/cpuinfo``."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    words = set((fields.get("flags") or fields.get("features") or "").split())
    wanted = _X86_FLAGS if arch == "x86" else _ARM_FLAGS
    return fields.get("model name", ""), tuple(sorted(words.intersection(wanted)))


def _usable_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
