"""What surrounds the network: normalization, activations, tasks and output kinds, on a network of two convolutions.

Oracle: the module as trained, activation included, called by hand; the outputs are made of its result in numpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the convert extra is not installed")
smp = pytest.importorskip("segmentation_models_pytorch", reason="the convert extra is not installed")

import onnxruntime  # noqa: E402
from export_models import SmallNet, by_hand, loaded, smooth_images  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from edgeseg.convert.export import export_onnx  # noqa: E402
from edgeseg.convert.heads import without_activation  # noqa: E402
from edgeseg.convert.loaded import LoadedModel  # noqa: E402
from edgeseg.errors import ExportError, SpecError  # noqa: E402
from edgeseg.spec import InputSpec, ModelSpec, OutputSpec, PipelineSpec, Preprocess  # noqa: E402
from edgeseg.store.onnx_file import read_onnx  # noqa: E402

pytestmark = pytest.mark.integration

SIZE = (24, 32)


def small(
    classes: int = 4,
    task: str = "multiclass",
    activation: str | None = None,
    *,
    channels: int = 3,
    labels: int = 0,
    preprocess: Preprocess | None = None,
    image: dict[str, Any] | None = None,
    **output: Any,
) -> tuple[LoadedModel, PipelineSpec]:
    torch.manual_seed(1)
    module = SmallNet(channels, classes, activation, labels).eval().requires_grad_(False)
    module.segmentation_head[0].weight.mul_(4.0)  # so that probabilities spread
    preprocess = preprocess or Preprocess(mean=(0.4, 0.5, 0.6, 0.3)[:channels], std=(0.2, 0.25, 0.3, 0.35)[:channels])
    model = ModelSpec(
        "custom",
        "small",
        classes,
        task=task,
        in_channels=channels,
        activation=activation,  # type: ignore[arg-type]
    )
    spec = PipelineSpec(
        model, InputSpec(*SIZE, channels=channels, stride=8, **(image or {})), preprocess, OutputSpec(**output)
    )
    return loaded(module, model, preprocess, stride=8), spec


def exported(model: LoadedModel, spec: PipelineSpec, folder: Path) -> Any:
    """Export, and return a function from uint8 images to outputs by name."""
    graph, report = export_onnx(model, spec, folder / "graph.onnx")
    assert report.mask_agreement == 1.0
    session = onnxruntime.InferenceSession(str(graph.path), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(None, {"image": images}), strict=True))


def as_probabilities(raw: NDArray[Any], activation: str | None, task: str) -> NDArray[Any]:
    """What the module returned, as probabilities, by the definition of each activation."""
    if activation in (None, "identity"):
        if task != "multiclass":
            return 1 / (1 + np.exp(-raw.astype(np.float64)))
        powers = np.exp(raw.astype(np.float64) - raw.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)
    if activation == "logsoftmax":
        return np.exp(raw)
    return (raw + 1) / 2 if activation == "tanh" else raw


IMAGES = smooth_images(1, *SIZE)


@pytest.mark.parametrize(
    ("task", "classes", "activation", "threshold"),
    [
        ("multiclass", 4, None, 0.5),
        ("multiclass", 4, "softmax2d", 0.5),
        ("multiclass", 4, "logsoftmax", 0.5),
        ("multiclass", 4, "sigmoid", 0.5),
        ("multiclass", 4, "clamp", 0.5),
        ("binary", 1, None, 0.3),
        ("binary", 1, "sigmoid", 0.6),
        ("binary", 1, "tanh", 0.4),
        ("binary", 1, "clamp", 0.2),
        ("multilabel", 3, "sigmoid", 0.45),
        ("multilabel", 3, "softmax2d", 0.35),
    ],
)
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_masks_probabilities_and_confidence_follow_the_activation(
    tmp_path: Path, task: str, classes: int, activation: str | None, threshold: float
) -> None:
    model, spec = small(classes, task, activation, kind="mask", confidence=True, threshold=threshold)
    got = exported(model, spec, tmp_path)(IMAGES)
    raw = by_hand(model, IMAGES).numpy()
    p = as_probabilities(raw, activation, task)
    if task == "multiclass":
        top = np.partition(raw, -2, axis=1)
        sure = top[:, -1] - top[:, -2] > 1e-4
        expected, confidence = raw.argmax(1), p.max(axis=1)
    else:
        sure = np.abs(p - threshold) > 1e-5
        expected, confidence = (p > threshold).astype(int), np.where(p > threshold, p, 1 - p)
        if task == "binary":
            sure, expected, confidence = sure[:, 0], expected[:, 0], confidence[:, 0]
    assert sure.mean() > (0.3 if activation == "clamp" else 0.9)
    assert len(np.unique(expected[sure])) > 1
    assert got["mask"].dtype == np.uint8
    np.testing.assert_array_equal(got["mask"][sure], expected[sure])
    assert got["confidence"].dtype == np.float32
    np.testing.assert_allclose(got["confidence"][sure], confidence[sure], atol=1e-4)


@pytest.mark.parametrize(("task", "activation"), [("multiclass", "softmax2d"), ("multilabel", "sigmoid")])
def test_logits_are_those_before_the_activation(tmp_path: Path, task: str, activation: str) -> None:
    model, spec = small(4, task, activation, kind="logits")
    got = exported(model, spec, tmp_path)(IMAGES)
    assert list(got) == ["logits"]
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    bare, removed = without_activation(model.module, activation, noise)
    assert removed
    with torch.inference_mode():
        again = bare.segmentation_head[2].__class__.__name__
    assert again == "Identity"
    undone = torch.from_numpy(got["logits"])
    back = undone.softmax(1) if activation == "softmax2d" else undone.sigmoid()
    np.testing.assert_allclose(back.numpy(), by_hand(model, IMAGES).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("task", "classes", "activation"), [("multiclass", 4, None), ("binary", 1, None), ("multiclass", 4, "logsoftmax")]
)
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_probabilities(tmp_path: Path, task: str, classes: int, activation: str | None) -> None:
    model, spec = small(classes, task, activation, kind="probabilities")
    got = exported(model, spec, tmp_path)(IMAGES)
    assert list(got) == ["probabilities"]
    expected = as_probabilities(by_hand(model, IMAGES).numpy(), activation, task)
    np.testing.assert_allclose(got["probabilities"], expected, atol=1e-5)


def test_more_than_256_classes_give_a_uint16_mask(tmp_path: Path) -> None:
    model, spec = small(300)
    mask = exported(model, spec, tmp_path)(IMAGES)["mask"]
    logits = by_hand(model, IMAGES).numpy()
    assert mask.dtype == np.uint16
    top = np.partition(logits, -2, axis=1)
    sure = top[:, -1] - top[:, -2] > 1e-4
    np.testing.assert_array_equal(mask[sure], logits.argmax(1)[sure])
    assert mask.max() > 255


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_numbers_of_channels(tmp_path: Path, channels: int) -> None:
    model, spec = small(channels=channels, kind="logits")
    images = smooth_images(1, *SIZE, channels)
    np.testing.assert_allclose(
        exported(model, spec, tmp_path)(images)["logits"], by_hand(model, images).numpy(), atol=1e-4
    )


def test_bgr_and_byte_range_normalization(tmp_path: Path) -> None:
    caffe = Preprocess(mean=(103.9, 116.8, 123.7), std=(58.0, 57.0, 57.5), scale=1.0, channel_order="bgr")
    model, spec = small(preprocess=caffe, kind="logits")
    got = exported(model, spec, tmp_path)(IMAGES)["logits"]
    np.testing.assert_allclose(got, by_hand(model, IMAGES).numpy(), atol=1e-4)
    # the swap is in the weights
    operators = [n.op_type for n in read_onnx(tmp_path / "graph.onnx").graph.node]
    assert operators[:5] == ["Cast", "Transpose", "Mul", "Add", "Conv"]


def test_a_kept_auxiliary_head_is_an_output(tmp_path: Path) -> None:
    model, spec = small(labels=5, confidence=True)
    got = exported(model, spec, tmp_path)(IMAGES)
    assert list(got) == ["mask", "confidence", "aux_logits"]
    np.testing.assert_allclose(got["aux_logits"], by_hand(model, IMAGES)[1].numpy(), atol=1e-5)


def test_a_static_batch_of_several(tmp_path: Path) -> None:
    from edgeseg.spec import BatchRange

    model, spec = small(kind="logits", image={"batch": BatchRange(3, 3, 3)})
    images = smooth_images(3, *SIZE)
    np.testing.assert_allclose(
        exported(model, spec, tmp_path)(images)["logits"], by_hand(model, images).numpy(), atol=1e-4
    )


def test_the_module_given_is_not_changed(tmp_path: Path) -> None:
    model, spec = small(activation="softmax2d")
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    layers = [type(m) for m in model.module.modules()]
    exported(model, spec, tmp_path)
    assert [type(m) for m in model.module.modules()] == layers
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    hashes = set()
    for name in ("a.onnx", "b.onnx"):
        model, spec = small()
        hashes.add(export_onnx(model, spec, tmp_path / name)[0].sha256)
    assert len(hashes) == 1


def test_a_wrong_graph_is_not_delivered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeseg.convert import export as module

    model, spec = small()
    original = module.export_graph

    def wrong(*args: Any) -> Any:
        graph = original(*args)
        for tensor in graph.graph.initializer:
            if tensor.name.endswith("segmentation_head.0.bias"):
                values = np.frombuffer(tensor.raw_data, np.float32) + np.float32([3, 0, 0, 0])
                tensor.raw_data = values.astype(np.float32).tobytes()
        return graph

    monkeypatch.setattr(module, "export_graph", wrong)
    with pytest.raises(ExportError, match="differ from PyTorch's"):
        export_onnx(model, spec, tmp_path / "graph.onnx")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model, spec = small()
    model.module.body.bias.fill_(float("nan"))  # type: ignore[union-attr,operator]
    with pytest.raises(ExportError, match="NaN or infinite"):
        export_onnx(model, spec, tmp_path / "graph.onnx")


def test_what_torch_cannot_export_is_one_line(tmp_path: Path) -> None:
    class Branching(torch.nn.Module):  # type: ignore[misc,name-defined]
        def forward(self, x: Any) -> Any:
            return x.repeat(1, 2, 1, 1)[:, :4] if x.sum() > 0 else x.repeat(1, 2, 1, 1)[:, 1:5]

    _, spec = small()
    model = loaded(Branching().eval(), spec.model, spec.preprocess, stride=8)
    with pytest.raises(SpecError, match="torch cannot export custom-small") as caught:
        export_onnx(model, spec, tmp_path / "graph.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_size_the_module_does_not_take_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    linknet = smp.create_model("linknet", "resnet18", encoder_weights=None, classes=4).eval()
    model, spec = small()
    with pytest.raises(SpecError, match="24x32"):
        export_onnx(loaded(linknet, model.model, model.preprocess, stride=8), spec, tmp_path / "graph.onnx")
