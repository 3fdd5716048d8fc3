"""What ``make pycuda`` looks for, and what it leaves when it cannot build; the build itself is CI's."""

from __future__ import annotations

from pathlib import Path

import pytest
from stub_cuda import install_pycuda
from stub_cuda.install_pycuda import CannotBuildError, include_folders, main, pip, toolkits


def folder(path: Path, *headers: str) -> Path:
    path.mkdir(parents=True)
    for name in headers:
        (path / name).touch()
    return path


def test_a_folder_with_both_headers_is_enough_and_the_first_wins(tmp_path: Path) -> None:
    half = folder(tmp_path / "half", "cuda.h")
    first = folder(tmp_path / "first", "cuda.h", "cudaProfiler.h")
    second = folder(tmp_path / "second", "cuda.h", "cudaProfiler.h")
    assert include_folders([tmp_path / "missing", half, first, second]) == [first]


def test_headers_of_two_packages_are_found_together(tmp_path: Path) -> None:
    runtime = folder(tmp_path / "cuda_runtime/include", "cuda.h")
    profiler = folder(tmp_path / "cuda_profiler_api/include", "cudaProfiler.h")
    assert include_folders([profiler, runtime]) == [runtime, profiler]
    assert include_folders([runtime]) == []


def test_a_named_toolkit_comes_before_the_one_around_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = folder(tmp_path / "found/bin", "nvcc") / "nvcc"
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(compiler.parent))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "named"))
    monkeypatch.delenv("CUDA_ROOT", raising=False)
    assert toolkits()[:2] == [tmp_path / "named/include", tmp_path / "found/include"]


def test_without_a_compiler_the_reason_is_printed_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(install_pycuda, "REASON", tmp_path / "reason.txt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    main()
    assert "no C and C++ compiler" in capsys.readouterr().out
    assert "no C and C++ compiler" in (tmp_path / "reason.txt").read_text()


def test_what_pip_says_becomes_the_reason(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CannotBuildError, match="pip download pycuda failed: ERROR: .*pycuda"):
        pip("download", "--no-deps", "pycuda")
    assert "pycuda" in capsys.readouterr().err
