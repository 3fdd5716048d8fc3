"""What the CPU backends share: reading the processor, build options, and refusing an engine of another machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeseg.backends.cpu.onnxruntime import OnnxRuntimeBackend
from edgeseg.backends.cpu.options import check_built_for, cpu_options, threads_and_streams
from edgeseg.errors import ArtifactError, SpecError
from edgeseg.machine.cpu import Cpu, is_emulated, parse_cpuinfo
from edgeseg.quantize.schemes import SCHEMES

X86 = """processor : 0
vendor_id : GenuineIntel
model name : Some Xeon
flags : fpu sse2 avx2 avx512f avx512bw avx512_vnni

processor : 1
model name : Some Xeon
flags : fpu sse2 avx2 avx512f avx512bw avx512_vnni
"""
ARM = "processor : 0\nFeatures : fp asimd asimddp i8mm\nCPU implementer : 0x41\n"


def test_cpuinfo_of_both_architectures() -> None:
    assert parse_cpuinfo(X86, "x86") == ("Some Xeon", ("avx2", "avx512_vnni", "avx512bw", "avx512f"))
    assert parse_cpuinfo(ARM, "arm") == ("", ("asimddp", "i8mm"))
    assert parse_cpuinfo("", "x86") == ("", ())


@pytest.mark.parametrize(
    ("text", "arch", "emulated"),
    [
        (X86, "x86", False),
        (ARM, "arm", False),
        (X86, "arm", True),
        (ARM, "x86", True),
        (X86, "other", False),
        ("", "arm", False),
    ],
)
def test_a_description_of_another_architecture_means_emulation(text: str, arch: str, emulated: bool) -> None:
    assert is_emulated(text, arch) is emulated


@pytest.mark.parametrize(
    ("arch", "flags", "scheme"),
    [
        ("x86", ("avx2", "avx512_vnni"), "onnxruntime-vnni"),
        ("x86", ("avx2", "avx_vnni"), "onnxruntime-vnni"),
        ("x86", ("avx2", "avx512f"), "onnxruntime-avx2"),
        ("x86", (), "onnxruntime-avx2"),
        ("arm", ("asimddp",), "onnxruntime-arm"),
        ("other", (), "onnxruntime-avx2"),
    ],
)
def test_the_scheme_follows_the_instruction_set(arch: str, flags: tuple[str, ...], scheme: str) -> None:
    assert OnnxRuntimeBackend(Cpu("some", arch, flags, 4)).scheme == scheme
    assert scheme in SCHEMES


def test_options_have_defaults() -> None:
    assert cpu_options("onnxruntime", {"spinning": None}) == {"threads": 0, "spinning": True, "streams": 1}
    assert cpu_options("onnxruntime", {"streams": 2}) == {"threads": 0, "spinning": False, "streams": 2}
    assert cpu_options("openvino", {"threads": 3}) == {"threads": 3, "streams": 1}


@pytest.mark.parametrize(
    ("options", "shared"),
    [({}, (4, 1)), ({"streams": 0}, (4, 4)), ({"threads": 6, "streams": 2}, (6, 2)), ({"streams": 9}, (4, 4))],
)
def test_streams_are_no_more_than_threads(options: dict[str, Any], shared: tuple[int, int]) -> None:
    assert threads_and_streams(cpu_options("openvino", options), 4) == shared


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thread": 2}, "no build option 'thread'; did you mean 'threads'"),
        ({"threads": -1}, "threads is -1; give a number from 0"),
        ({"threads": 1 << 20}, "threads is 1048576; give a number from 0 (one per core) to "),
        ({"threads": True}, "threads is True"),
        ({"threads": "2"}, "threads is '2'"),
        ({"spinning": 1}, "spinning is 1; give true or false"),
        ({"streams": -1}, "streams is -1; give 1 (the lowest latency), more, up to "),
        ({"streams": True}, "streams is True"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        cpu_options("onnxruntime", options)
    assert message in str(caught.value)


def test_an_engine_of_another_cpu_or_version_says_what_to_run() -> None:
    cpu = Cpu("some", "x86", ("avx2",), 2)

    def engine(isa: str, version: str) -> Any:
        manifest = SimpleNamespace(device={"isa": isa}, versions={"onnxruntime": version})
        return SimpleNamespace(folder=Path("engines/a"), manifest=manifest)

    check_built_for(engine("x86 avx2", "1.2"), cpu, "onnxruntime", "1.2")
    with pytest.raises(ArtifactError, match=r"CPU with \[x86 avx2 avx512_vnni\].*edgeseg compile engines/a"):
        check_built_for(engine("x86 avx2 avx512_vnni", "1.2"), cpu, "onnxruntime", "1.2")
    with pytest.raises(ArtifactError, match=r"onnxruntime 1\.2, this is 1\.3.*edgeseg compile"):
        check_built_for(engine("x86 avx2", "1.2"), cpu, "onnxruntime", "1.3")
