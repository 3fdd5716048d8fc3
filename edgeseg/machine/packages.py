"""Versions of installed packages, found without importing them."""

from __future__ import annotations

from importlib import metadata

COMPUTING_PACKAGES = (
    "numpy",
    "pillow",
    "torch",
    "torchvision",
    "segmentation-models-pytorch",
    "timm",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxsim",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu12",
    "opencv-python-headless",
)
"""Packages whose version may change a graph, an engine or a figure."""

# OpenCV's four distributions install the same module; any of them does.
_SAME_MODULE = {"opencv-python-headless": ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless")}


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, found without importing it; ``None`` when there is none."""
    names = (package, *_SAME_MODULE.get(package, ()))
    distributions = (next(iter(metadata.distributions(name=name)), None) for name in names)
    return next((str(distribution.version) for distribution in distributions if distribution is not None), None)


def package_versions(*names: str) -> dict[str, str]:
    """Installed versions of the given distributions; absent ones are left out."""
    return {name: version for name in names if (version := installed_version(name)) is not None}
