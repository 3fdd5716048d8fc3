"""A badly scaled network through ``edgeseg.build``: with equalization INT8 is that of the network it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgeseg
from benchmarks.badly_scaled import badly_scaled
from edgeseg.convert.load import load_model
from edgeseg.demo import sample_folder
from edgeseg.quantize.table import load_table
from edgeseg.spec import ModelRequest

pytestmark = pytest.mark.integration


def test_the_recipe_keeps_the_float_network() -> None:
    module, _ = badly_scaled("unet")
    image = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32))
    with torch.inference_mode():
        before, after = load_model(ModelRequest(arch="unet")).module(image), module(image)
    assert (before - after).abs().max() < 1e-4 * before.abs().max()


def test_int8_of_a_badly_scaled_network(tmp_path: Path) -> None:
    module, preprocess = badly_scaled("unet")
    common: dict[str, Any] = {"size": 128, "mean": preprocess.mean, "std": preprocess.std, "target": "onnxruntime"}
    agreement = {}
    for equalize in (False, True):
        engine = edgeseg.build(
            module,
            calibration=sample_folder() / "calib" / "images",
            calibration_limit=24,  # of which every fifth is kept for the verification
            equalize=equalize,
            output=tmp_path / f"{equalize}",
            **common,
        )
        assert engine.manifest.verification is not None
        agreement[equalize] = engine.manifest.verification.agreement
        assert engine.manifest.precision.mac_share["int8"] > 0.95
        assert ("equalization" in [repair.name for repair in engine.manifest.repairs]) is equalize
        assert bool(load_table(engine.folder / "calibration.json").equalization) is equalize
    assert agreement[False] < 0.9
    assert agreement[True] > 0.985
    # A table brings the equalization it was made with.
    table = engine.folder / "calibration.json"
    again = edgeseg.build(module, calibration=table, output=tmp_path / "again", **common)
    assert again.manifest.graph.sha256 == engine.manifest.graph.sha256
