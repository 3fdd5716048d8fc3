"""Runs under emulation of a CPU with AVX2 alone, in this Python.

python on_avx2.py layers SCHEME > errors.json
python on_avx2.py masks ENGINE_FOLDER IMAGES.npy MASKS.npy > share.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from neighbouring_weights import errors
from numpy.typing import NDArray

from edgeseg.backends.cpu.onnxruntime import OnnxRuntimeBackend
from edgeseg.machine.cpu import Cpu
from edgeseg.store.engine import read_manifest
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import OnnxGraph


def execute(model: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]  # type: ignore[no-any-return]


def masks(folder: Path, images: NDArray[np.uint8]) -> tuple[float, NDArray[np.uint8]]:
    """The share of int8 of a folder's portable graph compiled for AVX2, and the masks of ``(N, H, W, C)``."""
    backend = OnnxRuntimeBackend(Cpu("emulated", "x86", ("avx2",), 1))
    path = folder / "model.onnx"
    portable = OnnxGraph(path, sha256_file(path), "int8", read_manifest(folder).spec, "0" * 64, scheme=backend.scheme)
    with tempfile.TemporaryDirectory() as scratch:
        built = backend.build(portable, Path(scratch), {"threads": 1})
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(str(built.path), options)
        given = [session.run(["mask"], {"image": image[None]})[0] for image in images]
    return built.precision.mac_share.get("int8", 0.0), np.concatenate(given)


if __name__ == "__main__":
    what, subject, *files = sys.argv[1:]
    if what == "layers":
        answer: Any = errors(subject, execute)
    else:
        answer, made = masks(Path(subject), np.load(files[0]))
        np.save(files[1], made)
    json.dump(answer, sys.stdout)
