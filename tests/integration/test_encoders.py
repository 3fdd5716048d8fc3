"""One of the families in ``benchmarks/encoders.py`` a day, built for real; EDGESEG_ENCODER_SAMPLE=N takes the N-th."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("segmentation_models_pytorch")
pytest.importorskip("onnxruntime")

import edgeseg
from benchmarks.encoders import FILE, VARIANTS, architectures_for
from benchmarks.record import read_record

pytestmark = pytest.mark.integration

SIDE = 64
SMALL = (
    "tu-mobilenetv3_small_050", "timm-mobilenetv3_small_minimal_100", "tu-lcnet_035", "tu-mobilevitv2_050",
    "tu-hardcorenas_a", "mobilenet_v2", "tu-efficientvit_b0", "mit_b0", "tu-tf_efficientnet_lite0", "tu-regnetx_002",
    "tu-resnet10t", "tu-mnasnet_small", "tu-ghostnet_050", "tu-repvgg_a0", "tu-hgnetv2_b0", "tu-convnext_zepto_rms",
    "tu-tinynet_e", "tu-pvt_v2_b0",
)  # fmt: skip
"""Families whose smallest member builds in seconds."""


def _was_built(row: Mapping[str, Any]) -> bool:
    return all("agreement" in row.get(variant, {}) for variant in VARIANTS) and row["int8"]["int8_share"] > 0.95


# What was never built whole shall not stop somebody's landing: it comes in with its row in the table.
BUILT = [row["name"] for row in read_record(FILE).rows if row["name"] in SMALL and _was_built(row)]
SAMPLE = int(os.environ.get("EDGESEG_ENCODER_SAMPLE", date.today().toordinal())) % len(BUILT)


@pytest.mark.parametrize("encoder", [BUILT[SAMPLE]])
def test_an_encoder_builds_in_int8_and_for_any_size(encoder: str, tmp_path: Path) -> None:
    arch = next(
        a for a in architectures_for(encoder) if a not in ("pan", "deeplabv3", "unetplusplus")
    )  # the costly ones
    images = tmp_path / "images"
    images.mkdir()
    for k in range(8):
        noise = np.random.default_rng(k).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((SIDE // 8, SIDE // 8)).resize((SIDE, SIDE)).save(images / f"{k}.png")
    common: dict[str, Any] = {
        "encoder": encoder,
        "weights": "random",
        "classes": 4,
        "size": (SIDE, SIDE),
        "target": "onnxruntime",
        "validation": images,
    }
    int8 = edgeseg.build(arch, precision="int8", calibration=images, output=tmp_path / "int8", **common).manifest
    assert int8.precision.mac_share["int8"] > 0.9
    # Untrained, its classes are nearly tied: what is wrong agrees with a quarter.
    assert int8.verification is not None and int8.verification.agreement > 0.6
    dynamic = edgeseg.build(arch, precision="fp32", dynamic_size=True, output=tmp_path / "any", **common).manifest
    assert dynamic.spec.input.min_size is not None and dynamic.conversion["mask_agreement"] == 1.0
    assert dynamic.verification is not None and dynamic.verification.agreement > 0.999
