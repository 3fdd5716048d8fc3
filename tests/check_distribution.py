"""Build the wheel and the sdist and check them as a user meets them: ``make dist``.

Contents are compared with the files git tracks, metadata by twine; then the wheel is installed into clean environments
without torch, where ``edgeseg doctor`` and ``edgeseg run`` must work: of the oldest and the newest Python there are wheels of
everything for, as far as this machine has them. Where it has neither, or no package index, that part is left out and says why.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = "calibration/demo/"
# What the wheel is built from, and what says what it is; tests, benchmarks and their data stay in the repository.
SDIST = ("edgeseg/", SAMPLE, "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", ".gitignore")
VERSIONS = ("3.10", "3.13")
"""Of Python: the ends of ``requires-python``."""
NEEDED = ("edgeseg/py.typed", "edgeseg/report/templates/report.html.j2", "edgeseg/demo/fpn.safetensors")


def build(folder: Path) -> tuple[Path, Path]:
    """Build ``(wheel, sdist)`` into ``folder`` with the packages that are installed; nothing is fetched."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def tracked() -> set[str] | None:
    """Files of the repository, as git knows them; ``None`` where these files are no repository of git's, or git is missing."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return None
    listed = done.stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


def wheel_faults(wheel: Path, files: set[str]) -> list[str]:
    """What is in the wheel and should not be, and the reverse: it holds the package, the demo images, its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    inside = {name for name in names if ".dist-info/" not in name}
    wanted = {name for name in files if name.startswith("edgeseg/")}
    wanted |= {f"edgeseg/demo/sample/{n.removeprefix(SAMPLE)}" for n in files if n.startswith(SAMPLE)}
    faults = [f"wheel lacks {name}" for name in sorted(wanted - inside)]
    faults += [f"wheel has {name}" for name in sorted(inside - wanted)]
    faults += [f"repository lacks {name}" for name in NEEDED if name not in files]
    licensed = any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    return faults if licensed else [*faults, "wheel lacks its LICENSE"]


def sdist_faults(sdist: Path, files: set[str]) -> list[str]:
    """The same of the sdist, which holds what the wheel is built from."""
    with tarfile.open(sdist) as archive:
        inside = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    wanted = {name for name in files if name.startswith(SDIST)}
    faults = [f"sdist lacks {name}" for name in sorted(wanted - inside)]
    return faults + [f"sdist has {name}" for name in sorted(inside - wanted - {"PKG-INFO"})]


def interpreter(version: str) -> str | None:
    """A Python of this version that runs and makes environments: on the path, or one of pyenv's; ``None`` for none."""
    name = f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for path in (shutil.which(name), *sorted(pyenv.glob(f"{version}.*/bin/{name}"))):
        # pyenv's shims are on the path for versions that are not switched on, too, and Debian's Python may lack venv.
        if path and subprocess.run([path, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0:
            return str(path)
    return None


def install(wheel: Path, python: str, place: Path) -> str | None:
    """Install the wheel into a new environment of ``python``; return why it was left out, or ``None``."""
    subprocess.run([python, "-m", "venv", str(place)], check=True)
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, f"{wheel}[onnxruntime]"], capture_output=True, text=True, env=_alone())
    if done.returncode and "(from versions: none)" in done.stderr:  # other failures of pip are the wheel's
        return f"not installed, since no package index answers: {done.stderr.strip().splitlines()[-1]}"
    if done.returncode:
        raise SystemExit(f"{wheel.name} cannot be installed with {python}: {done.stderr.strip()}")
    return None


def check_installed(place: Path, engine: Path) -> str:
    """Run ``doctor`` and ``run`` of an environment; return what was seen."""
    edgeseg, folder = str(place / "bin" / "edgeseg"), place / "check"
    images = folder / "images"
    images.mkdir(parents=True)
    for name in ("000.jpg", "001.jpg"):
        shutil.copy(ROOT / SAMPLE / "val" / "images" / name, images)
    doctor = _json_of([edgeseg, "doctor", "--json"], folder)
    torch = [p["version"] for p in doctor["packages"] if p["name"] == "torch"]
    assert torch == [None], f"torch is in the environment: {torch}"
    own = shutil.copytree(engine, folder / "engine")
    # An older Python gets an older ONNX Runtime, for which the engine is made anew from its portable graph.
    result = _json_of([edgeseg, "run", str(own), str(images), "--output", "masks", "--recompile", "--json"], folder)
    assert result["images"] == 2
    assert len(result["written"]) == 2
    version = doctor["python"].partition(" ")[0]
    return f"edgeseg {doctor['edgeseg_version']} on Python {version} without torch: doctor, and 2 masks by run"


def _alone() -> dict[str, str]:
    """The environment without what leads to this checkout and its packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def _json_of(command: list[str], folder: Path) -> Any:
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=_alone())
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
        )
    return json.loads(done.stdout)


def main() -> None:
    """Run every check; exit 1 with the faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="where wheel and sdist are left")
    parser.add_argument("--python", action="append", help="interpreter of a clean environment; repeatable")
    parser.add_argument("--engine", type=Path, help="engine folder to run, instead of building one")
    given = parser.parse_args()
    for old in given.output.glob("edgeseg-*"):
        old.unlink()
    wheel, sdist = build(given.output)
    files = tracked()
    faults = [] if files is None else wheel_faults(wheel, files) + sdist_faults(sdist, files)
    if faults:
        raise SystemExit("\n".join(faults))
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)], check=True)
    seen = "its files are those of the repository" if files else "files not compared: this is no git repository"
    for path in (wheel, sdist):
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {seen}")
    here = {version: interpreter(version) for version in VERSIONS} if given.python is None else {}
    for version in (version for version, python in here.items() if python is None):
        print(f"Python {version}: none on this machine, not tried")
    pythons = given.python or [python for python in here.values() if python] or [sys.executable]
    with tempfile.TemporaryDirectory(prefix="edgeseg-dist-") as scratch, ThreadPoolExecutor() as pool:
        places = [Path(scratch) / f"venv-{number}" for number in range(len(pythons))]
        # Most of an installation is waiting for a package index: the engine is built meanwhile.
        installing = [pool.submit(install, wheel, *each) for each in zip(pythons, places, strict=True)]
        engine = given.engine or built(Path(scratch) / "engine")
        for python, place, left_out in zip(pythons, places, installing, strict=True):
            if (why := left_out.result()) is not None:
                print(f"{python}: {why}")
            else:
                print(check_installed(place, engine))


def built(folder: Path) -> Path:
    """The INT8 demo FPN."""
    words = ["build", "--arch", "fpn", "--precision", "int8", "--target", "onnxruntime", "--output", str(folder)]
    subprocess.run([sys.executable, "-m", "edgeseg", *words], check=True, capture_output=True)
    return folder


if __name__ == "__main__":
    main()
