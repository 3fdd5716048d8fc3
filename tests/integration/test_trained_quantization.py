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
from edgeseg.errors import InputError
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
