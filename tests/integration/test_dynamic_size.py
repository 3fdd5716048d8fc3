"""Dynamic size: only what the model does alike at every size, and padding that is the same at all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("segmentation_models_pytorch")
onnxruntime = pytest.importorskip("onnxruntime")

from timm.layers import ScaledStdConv2dSame  # noqa: E402
from timm.layers.conv2d_same import Conv2dSame  # noqa: E402
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame  # noqa: E402

from edgeseg.convert.dynamic_size import constant_same_padding, dynamic_sizes, pads_by_size  # noqa: E402
from edgeseg.convert.export import export_onnx  # noqa: E402
from edgeseg.convert.heads import LOGITS, Pipeline  # noqa: E402
from edgeseg.convert.loaded import LoadedModel  # noqa: E402
from edgeseg.errors import ExportError, SpecError  # noqa: E402
from edgeseg.spec import BatchRange, InputSpec, ModelSpec, OutputSpec, PipelineSpec, Preprocess  # noqa: E402

nn, functional = torch.nn, torch.nn.functional
pytestmark = pytest.mark.integration


class Map(nn.Module):
    """Layers that reduce an image, and the result enlarged to the image's size."""

    def __init__(self, *layers: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Any) -> Any:
        return functional.interpolate(self.layers(x), x.shape[-2:])


class ResizesOddSides(Map):
    """As MobileViT: features with an odd side are resized to the next even one."""

    def forward(self, x: Any) -> Any:
        features = self.layers(x)
        even = [side + side % 2 for side in features.shape[-2:]]
        if even != list(features.shape[-2:]):
            features = functional.interpolate(features, even) * 2.0
        return functional.interpolate(features, x.shape[-2:])


class InWindows(Map):
    """As DaViT and Hiera: features padded to whole windows of 7, made alike within each, cropped again."""

    def forward(self, x: Any) -> Any:
        y = self.layers(x).permute(0, 2, 3, 1)
        batch, height, width, channels = y.shape
        down, right = (7 - height % 7) % 7, (7 - width % 7) % 7
        padded = functional.pad(y, (0, 0, 0, right, 0, down))
        rows, columns = (height + down) // 7, (width + right) // 7
        windows = padded.view(batch, rows, 7, columns, 7, channels).transpose(2, 3).reshape(-1, 49, channels)
        windows = windows - windows.mean(1, keepdim=True)
        padded = windows.view(batch, rows, columns, 7, 7, channels).transpose(2, 3)
        y = padded.reshape(batch, rows * 7, columns * 7, channels)[:, :height, :width]
        return functional.interpolate(y.permute(0, 3, 1, 2), x.shape[-2:])


class OneSizeIsSpecial(Map):
    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        return torch.relu(y) if x.shape[-1] == 64 else y


class NeedsFour(Map):
    """Refuses features below 4x4, as PAN does."""

    def forward(self, x: Any) -> Any:
        return functional.interpolate(nn.AvgPool2d(4, 1)(self.layers(x)), x.shape[-2:])


class Amplifies(Map):
    """A chaotic map: the last bit of the input decides."""

    def forward(self, x: Any) -> Any:
        y = torch.sigmoid(self.layers(x))
        for _ in range(60):
            y = 3.99 * y * (1 - y)
        return y


def loaded(module: Any, stride: int = 1, fixed: tuple[int, int] | None = None) -> LoadedModel:
    module.eval().requires_grad_(False)
    model = ModelSpec("custom", "none", classes=3)
    return LoadedModel(module, model, Preprocess(), "random weights", "0" * 64, stride, (64, 64), fixed_size=fixed)


def same_layers() -> Any:
    return Map(
        Conv2dSame(3, 8, 3, stride=2),
        MaxPool2dSame(3, 2),
        Conv2dSame(8, 8, 5, stride=2, dilation=2),
        ScaledStdConv2dSame(8, 8, 4, stride=1),
        AvgPool2dSame(3, 2),
        Conv2dSame(8, 3, 2, stride=1),
    )


@pytest.mark.parametrize("size", [(16, 16), (16, 48), (80, 32), (96, 112)])
def test_constant_padding_is_same_padding_at_every_multiple(size: tuple[int, int]) -> None:
    module = same_layers().eval()
    constant = constant_same_padding(module, 3, 16)
    names = {type(layer).__name__ for layer in constant.modules()}
    assert not {"Conv2dSame", "MaxPool2dSame", "AvgPool2dSame"} & names
    image = torch.rand(2, 3, *size) - 0.5
    with torch.no_grad():
        assert torch.equal(constant(image), module(image))


def test_a_layer_whose_input_is_no_multiple_keeps_its_padding() -> None:
    module = same_layers().eval()
    constant = constant_same_padding(module, 3, 2)  # the second layer gets odd sides at some multiples of 2
    kinds = [type(layer).__name__ for layer in constant.layers]
    assert kinds[0] == "Conv2d" and kinds[1] == "MaxPool2dSame"
    image = torch.rand(1, 3, 22, 30)
    with torch.no_grad():
        assert torch.equal(constant(image), module(image))


def test_a_module_without_same_padding_is_returned_as_it_is() -> None:
    module = Map(nn.Conv2d(3, 3, 1))
    assert constant_same_padding(module, 3, 8) is module


@pytest.mark.parametrize(
    ("make", "stride", "size", "expected"),
    [
        (lambda: Map(nn.Conv2d(3, 3, 3, 8, 1)), 8, (64, 96), (8, (8, 8))),
        (lambda: ResizesOddSides(nn.Conv2d(3, 3, 3, 8, 1)), 8, (64, 96), (16, (16, 16))),
        (lambda: NeedsFour(nn.Conv2d(3, 3, 3, 8, 1)), 8, (64, 96), (8, (32, 32))),
    ],
    ids=["plain", "resizes odd sides", "needs four"],
)
def test_sizes_one_graph_serves(tmp_path: Path, make: Any, stride: int, size: tuple[int, int], expected: Any) -> None:
    model = loaded(make(), stride)
    sizes = dynamic_sizes(model, *size)
    assert (sizes.stride, sizes.min_size) == expected
    assert bool(sizes.notes) is (sizes.stride != stride)
    spec = PipelineSpec(
        model.model, InputSpec(*size, stride=sizes.stride, dynamic_size=True, min_size=sizes.min_size), model.preprocess
    )
    graph, _ = export_onnx(model, spec, tmp_path / "model.onnx")
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(graph.path), providers=["CPUExecutionProvider"])
    step = sizes.stride
    for height, width in (sizes.min_size, (5 * step, 6 * step), (12 * step, 7 * step)):
        image = np.random.default_rng(1).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
        x = (image / 255.0 - model.preprocess.mean) / model.preprocess.std
        with torch.no_grad():
            wanted = model.module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).float()).argmax(1)
        assert (session.run(None, {"image": image})[0] == wanted.numpy()).mean() > 0.999


def test_a_model_that_treats_one_size_alone_is_refused() -> None:
    with pytest.raises(SpecError, match="cannot have a dynamic size: its code does something else at 64x64"):
        dynamic_sizes(loaded(OneSizeIsSpecial(nn.Conv2d(3, 3, 1))), 64, 64)


def test_an_encoder_of_one_size_has_no_dynamic_one() -> None:
    with pytest.raises(SpecError, match="takes 64x64 only; leave --dynamic-size out"):
        dynamic_sizes(loaded(Map(nn.Conv2d(3, 3, 1)), fixed=(64, 64)), 64, 64)


def test_a_size_between_is_refused_with_the_nearest() -> None:
    with pytest.raises(SpecError, match="its code does the same at multiples of 16 only; nearest is 64x"):
        dynamic_sizes(loaded(ResizesOddSides(nn.Conv2d(3, 3, 3, 8, 1)), 8), 64, 80 + 8)


def test_a_size_that_the_model_refuses_is_refused_before_the_export() -> None:
    with pytest.raises(SpecError, match="does not take 16x64 images, it needs at least 32x64; give that as --size"):
        dynamic_sizes(loaded(NeedsFour(nn.Conv2d(3, 3, 3, 8, 1)), 8), 16, 64)


def static(model: LoadedModel, height: int, width: int) -> PipelineSpec:
    return PipelineSpec(model.model, InputSpec(height, width, stride=model.stride), model.preprocess)


def test_a_size_too_small_is_refused_with_one_that_does(tmp_path: Path) -> None:
    model = loaded(NeedsFour(nn.Conv2d(3, 3, 3, 8, 1)), 8)
    with pytest.raises(SpecError, match="does not take 16x64 images of 3 channels, it needs at least 32x64; give that"):
        export_onnx(model, static(model, 16, 64), tmp_path / "model.onnx")


def test_a_network_that_amplifies_rounding_is_told_from_a_wrong_graph(tmp_path: Path) -> None:
    model = loaded(Amplifies(nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 3, 3, padding=1)))
    with pytest.raises(ExportError, match="PyTorch's own float32 logits are .* off its float64 ones"):
        export_onnx(model, static(model, 32, 32), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_a_graph_whose_size_torch_fixed_is_refused(tmp_path: Path) -> None:
    model = loaded(OneSizeIsSpecial(nn.Conv2d(3, 3, 1)))
    spec = PipelineSpec(model.model, InputSpec(32, 64, stride=1, dynamic_size=True), model.preprocess)
    with pytest.raises(ExportError, match="can only be exported for .*width 64: its code depends on the size"):
        export_onnx(model, spec, tmp_path / "model.onnx")


def in_windows() -> Any:
    return InWindows(nn.Conv2d(3, 8, 7, 4, 3), nn.ReLU(), nn.Conv2d(8, 3, 3, 2, 1))


@pytest.mark.parametrize(("height", "width"), [(32, 64), (16, 16)], ids=["unequal", "one stride"])
def test_windows_are_exported_as_pytorch_computes_them(height: int, width: int, tmp_path: Path) -> None:
    model = loaded(in_windows(), 16)
    assert pads_by_size(model.module, InputSpec(height, width, stride=16, dynamic_size=True))
    batch = BatchRange(1, 1, 3)
    spec = PipelineSpec(
        model.model,
        InputSpec(height, width, stride=16, dynamic_size=True, batch=batch),
        model.preprocess,
        OutputSpec(LOGITS),
    )
    graph, _ = export_onnx(model, spec, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(graph.path)
    assert session.get_inputs()[0].shape == ["batch", "height", "width", 3]
    assert session.get_outputs()[0].shape == ["batch", 3, "height", "width"]
    for size in ((16, 16), (48, 80), (112, 224), (240, 32)):
        images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
        with torch.no_grad():
            expected = Pipeline(model.module, spec)(torch.from_numpy(images))["logits"].numpy()
        np.testing.assert_allclose(session.run(["logits"], {"image": images})[0], expected, atol=1e-4)


def test_padding_alike_at_every_size_is_told_from_padding_by_size() -> None:
    spec = InputSpec(48, 80, stride=16, dynamic_size=True)
    assert not pads_by_size(constant_same_padding(same_layers().eval(), 3, 16), spec)
    assert not pads_by_size(Map(nn.Conv2d(3, 3, 3, 8, 1)), spec)
