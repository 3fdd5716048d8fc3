"""Build the wheel and the sdist and check them as a user meets them: ``make dist``.

Contents are compared with the files git tracks, metadata by twine; then the wheel is installed into a clean environment
without torch, where ``edgeseg doctor`` and ``edgeseg run`` must work. Where no package index or folder of wheels has what the
environment needs, that part is left out and says why.
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
import venv
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = "calibration/demo/"
# What the wheel is built from, and what says what it is; tests, benchmarks and their data stay in the repository.
SDIST = ("edgeseg/", SAMPLE, "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", ".gitignore")
NEEDED = ("edgeseg/py.typed", "edgeseg/report/templates/report.html.j2", "edgeseg/demo/fpn.safetensors")


def build(folder: Path) -> tuple[Path, Path]:
    """Build ``(wheel, sdist)`` into ``folder`` with the packages that are installed; nothing is fetched."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def tracked() -> set[str]:
    """Files of the repository, as git knows them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
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


def check_installed(wheel: Path, engine: Path, python: str, folder: Path) -> str:
    """Install the wheel for one Python, run ``doctor`` and ``run``; return what was seen, or why it was left out."""
    place = folder / f"venv-{Path(python).name}"
    if python == sys.executable:
        venv.create(place, with_pip=True)
    else:
        subprocess.run([python, "-m", "venv", str(place)], check=True)
    inside = place / "bin"
    pip = [str(inside / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    installed = subprocess.run([*pip, f"{wheel}[onnxruntime]"], capture_output=True, text=True, env=_alone())
    if installed.returncode:
        return f"not installed, since pip could not: {installed.stderr.strip().splitlines()[-1]}"
    edgeseg = str(inside / "edgeseg")
    doctor = _json_of([edgeseg, "doctor", "--json"], folder)
    torch = [p["version"] for p in doctor["packages"] if p["name"] == "torch"]
    assert torch == [None], f"torch is in the environment: {torch}"
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for name in ("000.jpg", "001.jpg"):
        (images / name).write_bytes((ROOT / SAMPLE / "val" / "images" / name).read_bytes())
    output = folder / f"masks-{Path(python).name}"
    own = shutil.copytree(engine, folder / f"engine-{Path(python).name}")
    # An older Python gets an older ONNX Runtime, for which the engine is made anew from its portable graph.
    words = ["run", str(own), str(images), "--output", str(output), "--recompile", "--json"]
    result = _json_of([edgeseg, *words], folder)
    assert result["images"] == 2
    assert len(result["written"]) == 2
    return f"edgeseg {doctor['edgeseg_version']} on Python {doctor['python']} without torch: doctor, and 2 masks by run"


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
    faults = wheel_faults(wheel, files) + sdist_faults(sdist, files)
    if faults:
        raise SystemExit("\n".join(faults))
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)], check=True)
    for path in (wheel, sdist):
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, its files are those of the repository")
    with tempfile.TemporaryDirectory(prefix="edgeseg-dist-") as scratch:
        engine = given.engine or Path(scratch) / "engine"
        if given.engine is None:
            words = [
                "build",
                "--arch",
                "fpn",
                "--precision",
                "int8",
                "--target",
                "onnxruntime",
                "--output",
                str(engine),
            ]
            subprocess.run([sys.executable, "-m", "edgeseg", *words], check=True, capture_output=True)
        for python in given.python or [sys.executable]:
            print(check_installed(wheel, engine, python, Path(scratch)))


if __name__ == "__main__":
    main()
