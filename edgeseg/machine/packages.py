"""Versions of installed packages, found without importing them."""

from __future__ import annotations

from importlib import metadata

EXTRAS: dict[str, tuple[str, ...]] = {
    "base": ("numpy", "pillow", "msgspec", "click", "rich", "platformdirs"),
    "convert": (
        "torch",
        "torchvision",
        "segmentation-models-pytorch",
        "timm",
        "safetensors",
        "onnx",
        "onnx-ir",
        "onnxscript",
        "onnxsim",
        "onnxruntime",
        "jinja2",
        "huggingface-hub",
        "pyyaml",
    ),
    "onnxruntime": ("onnxruntime", "onnx"),
    "openvino": ("openvino", "onnx"),
    "tensorrt": ("tensorrt", "cuda-bindings", "onnx"),
    "jetson": ("cuda-bindings", "onnx"),
    "pycuda": ("pycuda", "onnx"),
    "tensorrt-rtx": ("tensorrt-rtx-cu12", "onnx"),
    "tiff": ("tifffile", "imagecodecs"),
    "raster": ("rasterio",),
    "video": ("opencv-python-headless",),
    "report": ("jinja2",),
    "sweep": ("ray",),
    "cluster": ("ray", "fsspec"),
    "power": ("nvidia-ml-py",),
}
"""Every package edgeseg uses, by the extra that brings it; ``base`` always comes. Each may change what is built."""

ALL_PACKAGES = tuple(dict.fromkeys(name for names in EXTRAS.values() for name in names))

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
