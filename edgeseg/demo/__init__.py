"""The demo models and the sample images they were trained beside, as package data. Nothing here imports torch.

``<arch>.json`` describes a demo model, ``<arch>.safetensors`` (float16) holds its weights; the sample folder holds
``calib`` and ``val`` images of generated street scenes.
"""

from __future__ import annotations

from pathlib import Path

from edgeseg.errors import ArtifactError

_FOLDER = Path(__file__).resolve().parent


def demo_models() -> tuple[str, ...]:
    """Return the architectures that have a demo model in this installation, sorted."""
    return tuple(sorted(p.stem for p in _FOLDER.glob("*.json") if p.with_suffix(".safetensors").is_file()))


def demo_files(arch: str) -> tuple[Path, Path]:
    """Return the description (JSON) and the weights (safetensors) of a demo model.

    Raises:
        ArtifactError: ``arch`` has no demo model here.
    """
    if arch not in demo_models():
        have = ", ".join(demo_models()) or "none in this installation"
        raise ArtifactError(f"no demo model for {arch!r} (there are: {have}); give --weights PATH instead")
    return _FOLDER / f"{arch}.json", _FOLDER / f"{arch}.safetensors"


def sample_folder() -> Path:
    """Return the folder of demo images: packaged in an installed edgeseg, ``calibration/demo`` in a checkout.

    Raises:
        ArtifactError: neither is there.
    """
    for folder in (_FOLDER / "sample", _FOLDER.parent.parent / "calibration" / "demo"):
        if folder.is_dir() and any(folder.iterdir()):
            return folder
    raise ArtifactError(
        "the demo images are not in this installation; make them with calibration/generate_demo.py of a checkout, "
        "or give your own folder with --calibration DIR"
    )
