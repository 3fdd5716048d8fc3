"""What all contenders are measured on: one trained network, images, ground truth, calibration images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeseg.convert.load import load_model
from edgeseg.convert.loaded import LoadedModel
from edgeseg.demo import sample_folder
from edgeseg.evaluate.accuracy.dataset import ValidationSet
from edgeseg.images.decoding import list_images, read_image
from edgeseg.spec import InputSpec, ModelRequest, OutputSpec, PipelineSpec

CAMVID_CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
CAMVID_WEIGHTS = "fpn-tf_efficientnet_lite0.safetensors"
# The network needs multiples of 32; 352 of the 360 rows are used, without resizing.
CAMVID_ROWS = slice(4, 356)


@dataclass(frozen=True)
class Workload:
    """A network and the images to measure it on.

    Attributes:
        name: for the results.
        loaded: the PyTorch model.
        spec: uint8 image in, uint8 mask out, at the size of the images.
        calibration: uint8 ``(H, W, 3)`` RGB.
        images: validation images, uint8 ``(H, W, 3)`` RGB.
        masks: int32 ``(H, W)``, -1 where unlabelled.
    """

    name: str
    loaded: LoadedModel
    spec: PipelineSpec
    calibration: tuple[NDArray[np.uint8], ...]
    images: tuple[NDArray[np.uint8], ...]
    masks: tuple[NDArray[np.int32], ...]

    def normalized(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 ``(H, W, 3)`` -> float32 ``(1, 3, H, W)``, as a peer without preprocessing in its graph computes it."""
        weight, bias = self.scale_and_shift()
        result = np.empty((1, 3, *image.shape[:2]), np.float32)
        for channel in range(3):
            # Writing each plane in place takes a fraction of a transpose of the whole, or of three table look-ups.
            np.multiply(image[..., channel], weight[channel], out=result[0, channel], dtype=np.float32)
            result[0, channel] += bias[channel]
        return result

    def scale_and_shift(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Per-channel factor and offset that the preprocessing amounts to (RGB)."""
        p = self.spec.preprocess
        assert p.channel_order == "rgb"
        std = np.asarray(p.std, np.float64)
        return (p.scale / std).astype(np.float32), (-np.asarray(p.mean) / std).astype(np.float32)


def camvid_folder() -> Path | None:
    """Where the CamVid data is: named by ``EDGESEG_CAMVID``, else beside the checkout; ``None`` where there is none."""
    root = Path(os.environ.get("EDGESEG_CAMVID") or Path(__file__).resolve().parents[2] / "shared" / "camvid")
    return root if (root / CAMVID_WEIGHTS).is_file() else None


def camvid(limit: int | None = None, calibration_limit: int | None = None) -> Workload:
    """FPN with a tf_efficientnet_lite0 encoder on CamVid, 352x480; a development data set, not part of the project."""
    root = camvid_folder()
    if root is None:
        raise SystemExit(f"no CamVid data: set EDGESEG_CAMVID to a folder with calib/, val/ and {CAMVID_WEIGHTS}")
    loaded = load_model(
        ModelRequest(
            arch="fpn",
            encoder="timm-tf_efficientnet_lite0",
            weights=str(root / CAMVID_WEIGHTS),
            classes=len(CAMVID_CLASSES),
            class_names=CAMVID_CLASSES,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        )
    )
    height = CAMVID_ROWS.stop - CAMVID_ROWS.start
    calibration = [read_image(path)[CAMVID_ROWS] for path in list_images(root / "calib")[:calibration_limit]]
    pairs = list(ValidationSet.open(root / "val", loaded.model).limited(limit))
    return Workload(
        name="camvid fpn tf_efficientnet_lite0 352x480",
        loaded=loaded,
        spec=_mask_spec(loaded, height, 480),
        calibration=tuple(map(np.ascontiguousarray, calibration)),
        images=tuple(np.ascontiguousarray(p.image[CAMVID_ROWS]) for p in pairs),
        masks=tuple(p.mask[CAMVID_ROWS] for p in pairs if p.mask is not None),
    )


def demo(arch: str, limit: int | None = None, calibration_limit: int | None = None) -> Workload:
    """A demo model on the generated street scenes that come with edgeseg, at their size: needs only the repository."""
    loaded = load_model(ModelRequest(arch=arch))
    root = sample_folder()
    pairs = list(ValidationSet.open(root / "val", loaded.model).limited(limit))
    height, width = pairs[0].image.shape[:2]
    return Workload(
        name=f"demo {arch} {loaded.model.encoder} {height}x{width}",
        loaded=loaded,
        spec=_mask_spec(loaded, height, width),
        calibration=tuple(read_image(path) for path in list_images(root / "calib" / "images")[:calibration_limit]),
        images=tuple(p.image for p in pairs),
        masks=tuple(p.mask for p in pairs if p.mask is not None),
    )


def _mask_spec(loaded: LoadedModel, height: int, width: int) -> PipelineSpec:
    return PipelineSpec(
        model=loaded.model,
        input=InputSpec(height=height, width=width, stride=loaded.stride),
        preprocess=loaded.preprocess,
        output=OutputSpec(kind="mask"),
    )
