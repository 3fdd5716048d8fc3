"""``edgeseg doctor``: what this machine has, what is missing, and what will be fast on it. Imports no torch."""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeseg.backends import BACKENDS, GPU_TARGETS, BackendStatus, get_backend
from edgeseg.cli.output import print_json, result_console
from edgeseg.evaluate.tables import MISSING, FigureTable
from edgeseg.machine.cpu import Cpu, this_cpu
from edgeseg.machine.packages import EXTRAS, installed_version
from edgeseg.machine.reading import Memory, core_limit, read_memory, read_text
from edgeseg.store.cache import CacheContent, cache_content
from edgeseg.version import __version__

if TYPE_CHECKING:
    from rich.console import Group

FEATURES: dict[str, dict[str, str]] = {
    "x86": {
        "avx2": "256-bit integer arithmetic",
        "avx512bw": "512-bit integer arithmetic",
        "avx_vnni": "int8 dot products, 256 bits",
        "avx512_vnni": "int8 dot products, 512 bits",
        "avx512_bf16": "bf16 dot products",
        "amx_int8": "int8 matrix tiles",
    },
    "arm": {
        "asimddp": "int8 dot products (dotprod)",
        "i8mm": "int8 matrix products",
        "asimdhp": "fp16 arithmetic",
        "sve": "scalable vectors",
    },
}
"""CPU features that decide what is fast, by architecture."""

MIB = 1 << 20


@dataclass(frozen=True)
class Package:
    """One Python package: version ``None`` when it is not installed."""

    name: str
    version: str | None
    extra: str


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        cpu: name, architecture, and those of its flags that matter.
        features: every feature in :data:`FEATURES` of this architecture, and whether the CPU has it.
        core_limit: CPUs a container may use at once (cgroup quota), ``None`` without a limit.
        board: model of a single-board computer such as a Jetson, if it tells.
        backends: by name.
        cache: place, size and limit of the results kept between builds.
        advice: sentences: what will be fast here and why, what to install, what to mind.
        torch_cuda: the CUDA that PyTorch is built for; ``None`` for none, or no PyTorch.
    """

    edgeseg_version: str
    system: str
    python: str
    board: str | None
    cpu: Cpu
    features: dict[str, bool]
    core_limit: float | None
    memory: Memory
    packages: tuple[Package, ...]
    backends: dict[str, BackendStatus]
    cache: CacheContent
    advice: tuple[str, ...]
    torch_cuda: str | None = None


def diagnose() -> Diagnosis:
    """Look at this machine. Never fails: what cannot be found out is ``None``."""
    cpu = this_cpu()
    packages = tuple(Package(name, installed_version(name), extra) for extra, names in EXTRAS.items() for name in names)
    backends = {name: _backend_status(name) for name in BACKENDS}
    limit = core_limit()
    memory = read_memory()
    cache = cache_content()
    cuda = torch_cuda()
    advice = advise(cpu, limit, memory, packages, backends, cuda)
    if not cache.writable:
        advice.append(
            f"The cache {cache.folder} cannot be written: builds keep nothing; EDGESEG_CACHE names another folder."
        )
    return Diagnosis(
        edgeseg_version=__version__,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=f"{platform.python_version()} ({sys.executable})",
        board=read_text(Path("/proc/device-tree/model")),
        cpu=cpu,
        features={name: name in cpu.flags for name in FEATURES.get(cpu.arch, {})},
        core_limit=limit,
        memory=memory,
        packages=packages,
        backends=backends,
        cache=cache,
        advice=tuple(advice),
        torch_cuda=cuda,
    )


def _backend_status(name: str) -> BackendStatus:
    try:
        return get_backend(name).status()
    except ImportError as exc:
        missing = f"{exc.name or 'a package'} is not installed: pip install 'edgeseg[{name}]'"
        return BackendStatus(False, None, missing)


def advise(
    cpu: Cpu,
    limit: float | None,
    memory: Memory,
    packages: tuple[Package, ...],
    backends: dict[str, BackendStatus],
    cuda_of_torch: str | None = None,
) -> list[str]:
    """Turn findings into sentences a person can act on, the most useful first."""
    said = [_what_is_fast(cpu)]
    if cpu.arch in {"x86", "arm"}:
        said.append(
            "fp16 graphs are computed in fp32 on this CPU: the portable graph is half as large, the engine no faster."
        )
    if not any(status.available for status in backends.values()):
        said.append("No backend can run here: pip install 'edgeseg[onnxruntime]'.")
    missing = {p.extra for p in packages if p.version is None}
    if "convert" in missing:
        lacking = ", ".join(p.name for p in packages if p.extra == "convert" and p.version is None)
        said.append(f"Engines can run here but not be built (no {lacking}): pip install 'edgeseg[convert]'.")
    versions = {p.name: p.version for p in packages}
    said.extend(_torch_pair(versions.get("torch"), versions.get("torchvision")))
    on_gpu = any(name in backends and backends[name].available for name in GPU_TARGETS)
    if on_gpu and versions.get("torch") is not None and cuda_of_torch is None:
        said.append(
            f"torch {versions['torch']} is built without CUDA: bench has no PyTorch to compare the GPU's engines with; "
            "install one for CUDA, or give --baseline pytorch-cpu."
        )
    if limit is not None and limit < cpu.cores:
        said.append(
            f"The container may use {limit:g} of {cpu.cores} CPUs at once: "
            f"build with --backend-option threads={max(1, int(limit))}."
        )
    usable = [b for b in (memory.available_bytes, memory.limit_bytes) if b is not None]
    if usable and min(usable) < 2048 * MIB:
        said.append(
            f"Only {min(usable) / MIB:.0f} MiB of memory are free: running needs little, building wants about 2048."
        )
    return said


def _what_is_fast(cpu: Cpu) -> str:
    if cpu.arch == "x86" and cpu.has_vnni:
        name = "AVX512-VNNI" if "avx512_vnni" in cpu.flags else "AVX-VNNI"
        return (
            f"int8 is the fast precision here: {name} multiplies u8 activations with s8 weights and adds in 32 bits, "
            "so nothing saturates."
        )
    if cpu.arch == "x86" and "avx2" in cpu.flags:
        return (
            "int8 is faster than fp32 here, by less than on a CPU with VNNI: AVX2 adds pairs of int8 products in 16 bits, so "
            "neighbouring weights are kept small enough for that."
        )
    if cpu.arch == "arm" and {"asimddp", "i8mm"} & set(cpu.flags):
        return "int8 is the fast precision here: dot-product instructions multiply s8 activations with s8 weights."
    if cpu.arch == "arm":
        return (
            "int8 gains little here: this CPU tells of no dot-product instructions; measure with --precision fp32 too."
        )
    return "Nothing is known about this CPU's int8 instructions: measure --precision int8 against fp32."


def _torch_pair(torch: str | None, torchvision: str | None) -> list[str]:
    """torch and torchvision built for different devices do not import together; their local versions show it."""
    if torch is None or torchvision is None:
        return []
    first, second = torch.partition("+")[2], torchvision.partition("+")[2]
    if first == second:
        return []
    return [
        f"torch {torch} and torchvision {torchvision} are not a pair ({first or 'default'} and {second or 'default'} "
        "build) and may not import: install both from one index in one pip command."
    ]


def torch_cuda(package: Path | None = None) -> str | None:
    """The CUDA that the PyTorch here is built for, read from its files: importing it takes seconds. ``None``: for none."""
    if package is None:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            return None
        package = Path(spec.origin).parent
    text = read_text(package / "version.py") or ""
    match = re.search(r"^cuda\b[^=\n]*= *['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return None if match is None else match[1]


def torch_line(diagnosis: Diagnosis) -> str:
    """What the PyTorch here can use, and so what its baselines run on."""
    version = next((p.version for p in diagnosis.packages if p.name == "torch"), None)
    if version is None:
        return "-"
    on_gpu = [name for name in GPU_TARGETS if name in diagnosis.backends and diagnosis.backends[name].available]
    where = "GPU engines are compared on the GPU" if on_gpu and diagnosis.torch_cuda else "runs on the CPU"
    built = "built without CUDA" if diagnosis.torch_cuda is None else f"for CUDA {diagnosis.torch_cuda}"
    return f"{version}, {built}: {where}"


def render(diagnosis: Diagnosis) -> Group:
    """The diagnosis for a terminal."""
    from rich.console import Group
    from rich.text import Text

    advice = [Text(f"* {sentence}") for sentence in diagnosis.advice]
    return Group(_machine_table(diagnosis), _backend_table(diagnosis), _package_table(diagnosis), *advice)


def _machine_table(diagnosis: Diagnosis) -> FigureTable:
    cpu, memory = diagnosis.cpu, diagnosis.memory
    table = FigureTable((("", "words"), ("", "words")), has_header=False)
    table.add("edgeseg", diagnosis.edgeseg_version)
    table.add("system", diagnosis.system + (f", {diagnosis.board}" if diagnosis.board else ""))
    table.add("python", diagnosis.python)
    limit = "" if diagnosis.core_limit is None else f", container limit {diagnosis.core_limit:g}"
    table.add("cpu", f"{cpu.name}, {cpu.cores} usable{limit}")
    explained = FEATURES.get(cpu.arch, {})
    for name, present in diagnosis.features.items():
        table.add("", f"{'yes' if present else 'no ':3} {name}: {explained[name]}")
    sizes = (("total", memory.total_bytes), ("available", memory.available_bytes), ("limit", memory.limit_bytes))
    table.add("memory", ", ".join(f"{b / MIB:.0f} MiB {word}" for word, b in sizes if b is not None) or MISSING)
    table.add("pytorch", torch_line(diagnosis))
    table.add("cache", cache_line(diagnosis.cache))
    return table


def cache_line(cache: CacheContent) -> str:
    """Place, size and limit of the cache, in words."""
    sizes = f"{cache.size_bytes / MIB:.0f} of at most {cache.max_size_bytes / MIB:.0f} MiB"
    return f"{cache.folder}, {sizes}" + ("" if cache.writable else ", cannot be written")


def _backend_table(diagnosis: Diagnosis) -> FigureTable:
    table = FigureTable((("backend", "name"), ("works", "words"), ("version", "name"), ("", "words")))
    for name, status in diagnosis.backends.items():
        table.add(name, "yes" if status.available else "no", status.version or MISSING, status.detail)
    return table


def _package_table(diagnosis: Diagnosis) -> FigureTable:
    table = FigureTable((("extra", "name"), ("packages", "words")))
    for extra in EXTRAS:
        ours = [p for p in diagnosis.packages if p.extra == extra]
        listed = ", ".join(f"{p.name} {p.version or 'missing'}" for p in ours)
        missing = any(p.version is None for p in ours)
        table.add(extra, listed + (f"; pip install 'edgeseg[{extra}]'" if missing and extra != "base" else ""))
    return table


@click.command("doctor", short_help="Show what this machine has and what will be fast on it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Show this machine's CPU, packages and backends, what is missing with its pip line, and what will be fast."""

    diagnosis = diagnose()
    if as_json:
        print_json(diagnosis)
    else:
        result_console().print(render(diagnosis))
