"""Build pycuda into this environment, for the tests of its layer: ``make pycuda``.

There is no wheel of it. It needs a C++ compiler, two headers of CUDA (of a toolkit on this machine, else of pip's CUDA
packages) and a ``libcuda.so`` to link with (the stub: of that only the name stays in the result, and a real driver is
found by it as well). Not optimized and without cuRAND, which edgeseg does not use: for use on a GPU,
``pip install 'edgeseg[pycuda]'``.

Where it cannot be built, the reason is printed and kept for the tests, which skip with it; the exit code is 0.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REASON = Path(sys.prefix) / "pycuda-not-built.txt"
HEADERS = ("cuda.h", "cudaProfiler.h")
# The headers alone; a version that is installed already (torch brings one) stays.
CUDA_FROM_PIP = "cuda-toolkit[cudart,profiler]"
TIME_LIMIT_S = 900


class CannotBuildError(Exception):
    """Why there is no pycuda."""


def main() -> None:
    if importlib.util.find_spec("pycuda") is not None:
        print("pycuda is installed")
        return
    REASON.unlink(missing_ok=True)
    try:
        build()
    except CannotBuildError as exc:
        REASON.write_text(f"{exc}\n", encoding="utf-8")
        print(f"pycuda is not built, and its tests will be skipped: {exc}")
    else:
        print("pycuda is built")


def build() -> None:
    """Raises :class:`CannotBuildError`."""
    sys.path.insert(0, str(ROOT / "tests"))
    import stub_cuda

    if stub_cuda.compiler() is None or (shutil.which("c++") or shutil.which("g++")) is None:
        raise CannotBuildError("no C and C++ compiler (cc, c++)")
    include = include_folders(toolkits())
    if not include:
        pip("install", CUDA_FROM_PIP)
        importlib.invalidate_caches()
        include = include_folders(pip_folders())
    if not include:
        raise CannotBuildError(f"no {' and '.join(HEADERS)} in a CUDA toolkit or in pip's {CUDA_FROM_PIP}")
    with tempfile.TemporaryDirectory(prefix="pycuda-") as scratch:
        folder = Path(scratch)
        stub_cuda.build(folder)
        (folder / "libcuda.so").symlink_to("libcuda.so.1")
        pip("download", "--no-deps", "--no-binary", "pycuda", "--dest", scratch, "pycuda")
        (archive,) = folder.glob("pycuda-*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        source = archive.with_name(archive.name.removesuffix(".tar.gz"))
        options = {
            "CUDA_INC_DIR": [str(path) for path in include],
            "CUDADRV_LIB_DIR": [scratch],
            "CUDA_ENABLE_CURAND": False,
            "CXXFLAGS": ["-O0", "-g0"],
        }
        (source / "siteconf.py").write_text("".join(f"{name} = {value!r}\n" for name, value in options.items()))
        pip("install", str(source))


def toolkits() -> list[Path]:
    """Where a CUDA toolkit has its headers: named by the environment, around ``nvcc``, or the usual place."""
    named = [Path(os.environ[name]) for name in ("CUDA_ROOT", "CUDA_HOME") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    beside = [Path(nvcc).resolve().parents[1]] if nvcc else []
    return [root / "include" for root in (*named, *beside, Path("/usr/local/cuda"))]


def pip_folders() -> list[Path]:
    """Where pip's CUDA packages have their headers: CUDA 13 in one folder, CUDA 12 in one a package."""
    nvidia = importlib.util.find_spec("nvidia")
    roots = nvidia.submodule_search_locations if nvidia is not None else None
    return sorted(path for root in roots or () for path in Path(root).glob("*/include"))


def include_folders(candidates: Iterable[Path]) -> list[Path]:
    """The first folder with both headers, else the first with each; nothing when one is nowhere."""
    folders = list(candidates)
    both = [folder for folder in folders if all((folder / name).is_file() for name in HEADERS)]
    if both:
        return both[:1]
    each = [next((folder for folder in folders if (folder / name).is_file()), None) for name in HEADERS]
    return [folder for folder in each if folder is not None] if None not in each else []


def pip(command: str, *arguments: str) -> None:
    call = [sys.executable, "-m", "pip", command, "--quiet", "--constraint", str(ROOT / "constraints.txt"), *arguments]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired as exc:
        raise CannotBuildError(f"pip {command} took more than {TIME_LIMIT_S} s") from exc
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        errors = [line.strip() for line in done.stderr.splitlines() if "error" in line.lower()]
        raise CannotBuildError(f"pip {command} {arguments[-1]} failed: {(errors or ['no message'])[0][:200]}")


if __name__ == "__main__":
    main()
