"""A model trained with fake-quantizers: its INT8 engine computes what it computes with them on, by its own scales."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image
from small_graphs import plain_session

import edgeseg
from edgeseg.demo import sample_folder
from edgeseg.errors import InputError, SpecError
from edgeseg.progress import SilentReporter
from edgeseg.quantize.calibration import calibrate
from edgeseg.quantize.qdq import write_qdq
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.quantize.table import load_table
from edgeseg.spec import InputSpec, ModelRequest, OutputSpec, PipelineSpec

torch = pytest.importorskip("torch")
from torch.ao import quantization as ao  # noqa: E402

from edgeseg.convert.architectures import import_smp  # noqa: E402
from edgeseg.convert.load import wrap_module  # noqa: E402
from edgeseg.pipeline.stages import export_stage  # noqa: E402

smp = import_smp()
pytestmark = pytest.mark.integration

SIDE = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pictures(part: str, count: int) -> list[NDArray[np.uint8]]:
    paths = sorted((sample_folder() / part / "images").iterdir())[:count]
    return [np.asarray(Image.open(path).convert("RGB").resize((SIDE, SIDE))) for path in paths]


def truth(count: int) -> NDArray[np.int64]:
    paths = sorted((sample_folder() / "val" / "masks").iterdir())[:count]
    masks = [np.asarray(Image.open(path).resize((SIDE, SIDE), Image.Resampling.NEAREST)) for path in paths]
    return np.stack(masks).astype(np.int64)


def normalized(images: list[NDArray[np.uint8]]) -> Any:
    pixels = (np.stack(images) / 255.0 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))


def train(module: Any, images: Any, masks: Any, steps: int, rate: float) -> None:
    optimizer = torch.optim.Adam(module.parameters(), rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randperm(len(images), generator=generator)[:8]
        loss = torch.nn.functional.cross_entropy(module(images[batch]), masks[batch], ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Quantizable(torch.nn.Module):  # type: ignore[misc]
    """What torch.ao's eager mode asks for: a stub where the image comes in."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.quant, self.network = ao.QuantStub(), network

    def forward(self, image: Any) -> Any:
        return self.network(self.quant(image))


def with_fake_quantizers(network: Any) -> Any:
    module = Quantizable(copy.deepcopy(network)).train()
    for part in list(module.modules()):
        names = dict(part.named_children())
        groups = (
            [["conv1", "bn1"], ["conv2", "bn2"]] if "bn2" in names else [["conv1", "bn1"]] if "bn1" in names else []
        )
        kinds = [type(child).__name__ for child in names.values()]
        if isinstance(part, torch.nn.Sequential) and kinds[:2] == ["Conv2d", "BatchNorm2d"]:
            groups = [list(names)[: 3 if kinds[2:] == ["ReLU"] else 2]]
        for group in groups:
            ao.fuse_modules_qat(part, group, inplace=True)
    module.qconfig = ao.get_default_qat_qconfig("qnnpack")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ao.prepare_qat(module, inplace=True)


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any]:
    """A U-Net of a few seconds' training, in float, and then with fake-quantizers."""
    masks = truth(24)
    torch.manual_seed(0)
    network = smp.Unet(
        "resnet18",
        encoder_weights=None,
        encoder_depth=3,
        decoder_channels=(32, 16, 16),
        classes=int(masks[masks < 255].max()) + 1,
    )
    images, labels = normalized(pictures("val", 24)), torch.from_numpy(masks)
    train(network.train(), images, labels, 25, 2e-3)
    module = with_fake_quantizers(network)
    train(module, images, labels, 8, 5e-4)
    module.apply(ao.disable_observer)
    return network.eval(), module.eval()


@pytest.fixture(scope="module")
def expected(trained: tuple[Any, Any]) -> NDArray[np.int64]:
    """The oracle: masks of the module itself, its fake-quantizers on."""
    with torch.no_grad():
        masks: NDArray[np.int64] = trained[1](normalized(pictures("val", 24))).argmax(1).numpy()
    return masks


def agreement(graph: Path, expected: NDArray[np.int64]) -> float:
    session = plain_session(onnx.load(graph))
    masks = [session.run(["mask"], {"image": image[None]})[0] for image in pictures("val", 24)]
    return float((np.concatenate(masks) == expected).mean())


def test_an_engine_takes_the_scales_of_training(
    trained: tuple[Any, Any], expected: NDArray[np.int64], tmp_path: Path
) -> None:
    said: list[str] = []
    calibration = pictures("calib", 12)
    engine = edgeseg.build(
        trained[1], size=SIDE, mean=MEAN, std=STD, target="onnxruntime", scheme="onnxruntime-vnni",
        calibration=calibration, output=tmp_path / "engine", reporter=said.append,
    )  # fmt: skip
    table = load_table(engine.folder / "calibration.json")
    assert table.trained is not None
    assert table.trained.tools == ("torch.ao",)
    assert table.trained.lost == table.trained.ambiguous == 0
    assert table.trained.calibrated > 0  # the sums of the encoder, which eager mode leaves in float
    verification = engine.manifest.verification
    assert verification is not None
    assert verification.data.endswith("PyTorch is the module with its fake-quantizers on")
    words = "\n".join(said)
    assert f"{table.trained.activations} of activations, 17 of weights" in words
    assert "the weights of 17 of 17 layers are held as they were trained" in words

    # Plain quantization of the weights that training started to round, for the same scheme and images.
    loaded = wrap_module(trained[1], ModelRequest(mean=MEAN, std=STD)).in_float()
    spec = PipelineSpec(loaded.model, InputSpec(SIDE, SIDE, stride=loaded.stride), loaded.preprocess, OutputSpec())
    (tmp_path / "float").mkdir()
    graph, _ = export_stage(loaded, spec, tmp_path / "float", SilentReporter())
    plain = write_qdq(
        graph, calibrate(graph, CalibrationSet.open(calibration)), SCHEMES["onnxruntime-vnni"], tmp_path / "plain.onnx"
    )
    own, others = agreement(engine.folder / "model.onnx", expected), agreement(plain.path, expected)
    assert own > 0.99, own
    assert 1 - own < (1 - others) / 2, (own, others)


def test_a_float_engine_is_the_float_network(trained: tuple[Any, Any], tmp_path: Path) -> None:
    said: list[str] = []
    engine = edgeseg.build(
        trained[1], precision="fp32", size=SIDE, mean=MEAN, std=STD, target="onnxruntime", output=tmp_path / "engine",
        reporter=said.append,
    )  # fmt: skip
    assert any("fake-quantizers are off for fp32" in line for line in said)
    assert engine.manifest.verification is not None
    assert engine.manifest.verification.agreement > 0.999
    floating = copy.deepcopy(trained[1])
    floating.apply(ao.disable_fake_quant)
    with torch.no_grad():
        masks = floating(normalized(pictures("val", 24))).argmax(1).numpy()
    assert agreement(engine.folder / "model.onnx", masks) > 0.999


def test_a_module_without_scales_of_its_own_needs_images(trained: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="int8 needs calibration images"):
        edgeseg.build(trained[0], size=SIDE, mean=MEAN, std=STD, output=tmp_path / "engine")


class Frozen(torch.nn.Module):  # type: ignore[misc]
    """A fake-quantizer as exporters take it: torch.ao's fused one has no ONNX form."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.register_buffer("scale", part.scale.clone())
        self.register_buffer("zero_point", part.zero_point.to(torch.int32))
        observer = part.activation_post_process
        self.axis, self.limits = part.ch_axis, (observer.quant_min, observer.quant_max)
        self.numbers = (float(part.scale), int(part.zero_point)) if part.scale.numel() == 1 else None

    def forward(self, x: Any) -> Any:
        if self.numbers is None:
            return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, self.axis, *self.limits)
        return torch.fake_quantize_per_tensor_affine(x, *self.numbers, *self.limits)


def exported(module: Any, path: Path, *, dynamo: bool, is_dynamic: bool = False) -> Path:
    """By the older exporter or the newer, for one image of one size or for any, which torch's fake quantization cannot."""
    module = copy.deepcopy(module).requires_grad_(False)
    for parent in list(module.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, ao.FakeQuantizeBase):
                setattr(parent, name, Frozen(part))
    dim = torch.export.Dim.DYNAMIC
    shapes: Any = {"dynamic_shapes": ({0: dim, 2: dim, 3: dim},)} if is_dynamic else {}
    image = torch.zeros(2, 3, SIDE, SIDE + 32) if is_dynamic else torch.zeros(1, 3, SIDE, SIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (image,), path, dynamo=dynamo, verbose=False, **shapes)
    return path


def masks_of(file: Path) -> NDArray[np.int64]:
    """The oracle: the file as it is written, on images normalized here."""
    session = plain_session(onnx.load(file))
    name = session.get_inputs()[0].name
    logits = [session.run(None, {name: normalized([image]).numpy()})[0] for image in pictures("val", 24)]
    masks: NDArray[np.int64] = np.concatenate(logits).argmax(1)
    return masks


def built(file: Path, tmp_path: Path, **said: Any) -> edgeseg.Engine:
    return edgeseg.build(
        file, size=SIDE, mean=MEAN, std=STD, target="onnxruntime", scheme="onnxruntime-vnni", output=tmp_path / "engine", **said
    )  # fmt: skip


@pytest.mark.parametrize("dynamo", [False, True])
def test_an_onnx_file_with_pairs_is_what_the_module_is(
    trained: tuple[Any, Any], expected: NDArray[np.int64], tmp_path: Path, dynamo: bool
) -> None:
    said: list[str] = []
    file = exported(trained[1], tmp_path / "qat.onnx", dynamo=dynamo)
    truth = masks_of(file)
    assert (truth == expected).mean() > 0.999
    engine = built(file, tmp_path, calibration=pictures("calib", 12), reporter=said.append)
    assert agreement(engine.folder / "model.onnx", truth) > 0.99
    table, verification = load_table(engine.folder / "calibration.json"), engine.manifest.verification
    assert table.trained is not None
    assert table.trained.tools == ("the ONNX file",)
    assert table.trained.lost == table.trained.ambiguous == 0
    assert verification is not None
    assert verification.reference == "the ONNX file"
    assert verification.pytorch_size_bytes > 0
    words = "\n".join(said)
    assert f"{table.trained.activations} of activations, 17 of weights" in words
    assert "the weights of 17 of 17 layers are held as they were trained" in words
    assert "PyTorch" not in words
    assert "network.decoder.blocks.0.conv1.0/Conv" in {
        node.name for node in onnx.load(engine.folder / "model.onnx").graph.node
    }
    assert engine.manifest.model_request == ModelRequest(str(file), mean=MEAN, std=STD)
    assert f"--weights {file}" in str(engine.manifest.command) or "--weights" not in str(engine.manifest.command)


def test_a_file_of_onnx_runtimes_quantizer_keeps_its_scales(trained: tuple[Any, Any], tmp_path: Path) -> None:
    """Calibrated and not trained; it leaves out the ReLUs that its integers stand for."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.batches = iter([{name: normalized([image]).numpy()} for image in pictures("calib", 12)])

        def get_next(self) -> Any:
            return next(self.batches, None)

    plain, file = exported(trained[0], tmp_path / "plain.onnx", dynamo=False), tmp_path / "qdq.onnx"
    quantize_static(plain, file, Images(onnx.load(plain).graph.input[0].name), per_channel=True)
    kinds = [node.op_type for node in onnx.load(file).graph.node]
    assert kinds.count("Relu") < [node.op_type for node in onnx.load(plain).graph.node].count("Relu")
    engine = built(file, tmp_path)
    assert agreement(engine.folder / "model.onnx", masks_of(file)) > 0.99
    table = load_table(engine.folder / "calibration.json")
    assert table.trained is not None
    assert table.images == 0


def test_a_float_file_is_calibrated_as_a_module_is(trained: tuple[Any, Any], tmp_path: Path) -> None:
    file = exported(trained[0], tmp_path / "plain.onnx", dynamo=True, is_dynamic=True)
    with pytest.raises(InputError, match="int8 needs calibration images"):
        built(file, tmp_path)
    engine = built(file, tmp_path, calibration=pictures("calib", 12), batch="1:2:4")
    assert agreement(engine.folder / "model.onnx", masks_of(file)) > 0.9
    assert load_table(engine.folder / "calibration.json").trained is None


def test_a_float_engine_of_a_file_with_pairs(trained: tuple[Any, Any], tmp_path: Path) -> None:
    """Oracle: the module with the fake-quantizers of its activations off; those of weights are in what the file holds."""
    file = exported(trained[1], tmp_path / "qat.onnx", dynamo=False)
    engine = built(file, tmp_path, precision="fp32")
    floating = copy.deepcopy(trained[1])
    for name, part in floating.named_modules():
        if name.endswith("activation_post_process"):
            part.apply(ao.disable_fake_quant)
    with torch.no_grad():
        masks = floating(normalized(pictures("val", 24))).argmax(1).numpy()
    assert agreement(engine.folder / "model.onnx", masks) > 0.999
    with pytest.raises(SpecError, match="was exported for 1 image at a time, not 4; give --batch 1|batch 1"):
        built(file, tmp_path / "other", precision="fp32", batch=4)
