"""Graphs behind another host's input and output, against PyTorch: from a module to the host's mask in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the convert extra is not installed")
smp = pytest.importorskip("segmentation_models_pytorch", reason="the convert extra is not installed")

import onnxruntime  # noqa: E402
from engine_folders import write_manifest  # noqa: E402
from export_models import by_hand, loaded, smooth_images  # noqa: E402

from edgeseg.convert.export import export_onnx  # noqa: E402
from edgeseg.handover import deepness, deepstream, isaac_ros, jetson_inference  # noqa: E402
from edgeseg.handover.face import with_face  # noqa: E402
from edgeseg.spec import InputSpec, ModelSpec, OutputSpec, PipelineSpec, Preprocess  # noqa: E402
from edgeseg.store.engine import open_engine  # noqa: E402

pytestmark = pytest.mark.integration

SIZE = (32, 48)
FACES = {module.__name__: module.FACE for module in (deepness, deepstream, isaac_ros, jetson_inference)}
# What each host hands over, written again from its source: pixels 0..1, 0..255, 0..1 and ImageNet's normalization.
IMAGENET = (np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225]))
HANDED: dict[str, Any] = {
    deepness.__name__: lambda images: np.float32(images * 1.0 / 255.0),
    deepstream.__name__: lambda images: np.float32(images),
    isaac_ros.__name__: lambda images: images.astype(np.float32) * np.float32(1 / 255),
    jetson_inference.__name__: lambda images: (images * np.float32(1 / 255) - IMAGENET[0]) / IMAGENET[1],
}


@pytest.mark.parametrize(
    ("classes", "activation", "order"),
    [(5, "softmax2d", "bgr"), (1, None, "rgb")],
)
def test_the_hosts_masks_are_pytorchs(classes: int, activation: str | None, order: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    body = torch.nn.Conv2d(3, 8, 3, padding=1)
    head = smp.base.SegmentationHead(8, classes, activation=activation)
    module = torch.nn.Sequential(body, torch.nn.ReLU(), head).eval().requires_grad_(False)
    preprocess = Preprocess((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), channel_order=order)
    model = ModelSpec("custom", classes=classes, task="binary" if classes == 1 else "multiclass", activation=activation)
    spec = PipelineSpec(model, InputSpec(*SIZE, stride=1), preprocess, OutputSpec(threshold=0.45))
    network = loaded(module, model, preprocess, stride=1)
    export_onnx(network, spec, tmp_path / "model.onnx")
    write_manifest(tmp_path, spec)
    images = smooth_images(1, *SIZE)
    raw = by_hand(network, images).numpy()
    if classes == 1:
        above = raw[:, 0] - (0.45 if activation else np.log(0.45 / 0.55))
        expected, margin = (above > 0).astype(np.int64), np.abs(above)
    else:
        ordered = np.sort(raw, axis=1)
        expected, margin = raw.argmax(axis=1), ordered[:, -1] - ordered[:, -2]
    assert len(np.unique(expected)) > 1
    for host, face in FACES.items():
        made = with_face(open_engine(tmp_path), face)
        session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
        planes = np.ascontiguousarray(np.float32(HANDED[host](images)).transpose(0, 3, 1, 2))
        (answer,) = session.run([face.output], {face.input: planes})
        mask = answer[..., 0] if face.answer == "classes" else answer.argmax(axis=1)
        assert np.all((mask == expected) | (margin < 1e-5)), host
