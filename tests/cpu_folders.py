"""Engine folders a build for the CPU leaves behind, made of a small graph without torch: shared by the tests of folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from engine_folders import write_manifest
from numpy.typing import NDArray
from small_graphs import graph, spec, table_for

from edgeseg.backends import get_backend, portable
from edgeseg.quantize.qdq import write_qdq
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import AccuracyFigures, LatencyFigures, OnnxGraph, Verification

SIDE, CLASSES = 16, 5
IMAGES = np.random.default_rng(5).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8)
COMMAND = "edgeseg build --arch fpn --target onnxruntime --output engines/a"


def model() -> onnx.ModelProto:
    """Always the same network; its mask of ``IMAGES`` shows every class."""
    rng = np.random.default_rng(6)

    def floats(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape).astype(np.float32)

    return graph(
        f"(uint8[1, {SIDE}, {SIDE}, 3] image) => (uint8[1, {SIDE}, {SIDE}] mask)",
        """real = Cast <to = 1> (image) planes = Transpose <perm = [0, 3, 1, 2]> (real) x = Mul(planes, gain)
        a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) r = Relu(a) b = Conv <pads = [1, 1, 1, 1]> (r, w2, b2) s = Relu(b)
        l = Conv(s, w3, b3) index = ArgMax <axis = 1, keepdims = 0> (l) mask = Cast <to = 2> (index)""",
        gain=np.array(1 / 128, np.float32),
        w1=floats(8, 3, 3, 3),
        b1=floats(8),
        w2=floats(8, 8, 3, 3),
        b2=floats(8),
        w3=floats(CLASSES, 8, 1, 1),
        b3=floats(CLASSES),
    )


def verification() -> Verification:
    latency = LatencyFigures(10.0, 11.0, 12.0, 100)
    return Verification(
        0.99, 0.9, 0.95, 8, "eight images", AccuracyFigures(), AccuracyFigures(), latency, latency, 2000, 1000
    )


def folder_for(folder: Path, target: str, scheme: str, *, portable_only: bool = False) -> Path:
    """What a verified int8 build leaves behind."""
    folder.mkdir()
    float_path = folder / "float.onnx"
    network = model()
    onnx.save(network, float_path)
    contract = spec(SIDE, SIDE, CLASSES)
    fp32 = OnnxGraph(float_path, sha256_file(float_path), "fp32", contract, "0" * 64)
    written = write_qdq(fp32, table_for(network, image=IMAGES), SCHEMES[scheme], folder / "model.onnx")
    float_path.unlink()
    built = (
        portable.portable_engine(written, target, "int8", {})
        if portable_only
        else get_backend(target).build(written, folder, {})
    )
    write_manifest(
        folder,
        contract,
        target=target,
        built=built,
        scheme=scheme,
        versions={"torch": "2.0", **built.versions},
        candidates={"onnxruntime": 10.0, "openvino": 11.0},
        command=COMMAND,
        verification=verification(),
    )
    return folder


def own_scheme() -> str:
    return get_backend("onnxruntime").scheme
