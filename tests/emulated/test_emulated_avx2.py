"""INT8 on the kernels of a CPU with AVX2 and no VNNI, emulated: nothing overflows, and the masks are those of VNNI's kernels.

``make avx2``; not part of ``make test``. Skipped with the reason where there is no emulator.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated.emulated_machine import ROOT, CannotEmulateError, emulated_avx2
from emulated.on_avx2 import masks
from PIL import Image

import edgeseg
from edgeseg.demo import demo_models
from edgeseg.machine.cpu import this_cpu

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not this_cpu().has_vnni, reason="compares with the kernels of a CPU with VNNI"),
]

DEMO = ROOT / "calibration" / "demo"


@pytest.fixture(scope="session")
def python() -> tuple[str, ...]:
    try:
        return emulated_avx2(Path(os.environ.get("EDGESEG_AVX2_EMULATOR") or ROOT / ".avx2"))
    except CannotEmulateError as exc:
        pytest.skip(f"no emulator: {exc}")


def emulated(python: tuple[str, ...], *arguments: str | Path) -> Any:
    done = subprocess.run(
        [*python, Path(__file__).with_name("on_avx2.py"), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def test_no_pair_of_products_overflows(python: tuple[str, ...]) -> None:
    errors = emulated(python, "layers", "onnxruntime-avx2")
    # One step of an 8-bit result is 0.004 of its range.
    assert {name: error for name, error in errors.items() if error > 0.01} == {}


def test_weights_for_vnni_do_overflow_there(python: tuple[str, ...]) -> None:
    errors = emulated(python, "layers", "onnxruntime-vnni")
    assert errors["convolution"] > 0.1, "the kernels were to be AVX2's"
    assert max(error for name, error in errors.items() if name.startswith("depthwise")) < 0.01


@pytest.mark.parametrize("arch", demo_models())
def test_masks_are_those_of_other_kernels(python: tuple[str, ...], arch: str, tmp_path: Path) -> None:
    engine = edgeseg.build(
        arch, precision="int8", size=(128, 128), target="onnxruntime", scheme="onnxruntime-avx2", output=tmp_path / "e"
    )
    images = np.stack(
        [np.asarray(Image.open(path).resize((128, 128))) for path in sorted((DEMO / "val/images").iterdir())[:8]]
    )
    np.save(tmp_path / "images.npy", images)
    share = emulated(python, "masks", engine.folder, tmp_path / "images.npy", tmp_path / "masks.npy")
    share_here, masks_here = masks(engine.folder, images)
    assert share == share_here > 0.99
    np.testing.assert_array_equal(np.load(tmp_path / "masks.npy"), masks_here)
