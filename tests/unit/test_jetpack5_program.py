"""The program that docs/jetson.md has for Python 3.8 and TensorRT 8.5: its calls are those of that version's surface.

Its CUDA is made up here: memory on the host, and copies when they are asked for. Nothing is computed.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from documented import ROOT, blocks
from PIL import Image
from recorded_tensorrt import Recorder
from recorded_tensorrt.graphs import SIDE, small_model

from edgeseg.backends.tensorrt.opset17 import for_tensorrt_8

(PROGRAM,) = [
    block.lines[0]
    for block in blocks(ROOT / "docs" / "jetson.md")
    if "pycuda" in block.lines[0] and block.language == "python"
]


class HostMemory:
    """What stands for the device's memory."""

    allocated: dict[int, HostMemory]

    def __init__(self, size: int) -> None:
        self.bytes = np.zeros(size, np.uint8)
        self.address = 256 * (1 + len(self.allocated))
        self.allocated[self.address] = self

    def __int__(self) -> int:
        return self.address


def test_it_segments_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ast.parse(PROGRAM, feature_version=(3, 8))
    recorder = Recorder("8.5.3.1")
    trt = recorder.module
    logger = trt.Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    assert trt.OnnxParser(network, logger).parse(for_tensorrt_8(small_model()).model.SerializeToString())
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    (tmp_path / "fpn.plan").write_bytes(bytes(plan))
    picture = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "in.png")
    HostMemory.allocated = {}

    def execute(context: Any) -> bool:
        image, mask = (HostMemory.allocated[context._state["addresses"][name]].bytes for name in ("image", "mask"))
        mask[:] = image.reshape(-1, 3)[:, 1]
        return True

    recorder.fakery.on_execute = execute
    driver = ModuleType("pycuda.driver")
    vars(driver).update(
        mem_alloc=HostMemory,
        Stream=lambda: SimpleNamespace(handle=1, synchronize=lambda: None),
        memcpy_htod_async=lambda there, array, stream: np.copyto(there.bytes, array.reshape(-1)),
        memcpy_dtoh_async=lambda array, there, stream: np.copyto(array.reshape(-1), there.bytes),
    )
    package = ModuleType("pycuda")
    vars(package).update(driver=driver, autoinit=ModuleType("pycuda.autoinit"))
    modules = {"tensorrt": trt, "pycuda": package, "pycuda.driver": driver, "pycuda.autoinit": package.autoinit}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "argv", ["run.py", *(str(tmp_path / name) for name in ("fpn.plan", "in.png", "out.png"))])
    exec(compile(PROGRAM, "run.py", "exec"), {"__name__": "__main__"})
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), picture[..., 1])
