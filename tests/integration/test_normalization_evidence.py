"""Which images a network was trained on, told by its first batch norm. Oracle: networks whose statistics were measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgeseg.demo import demo_files, sample_folder
from edgeseg.errors import SpecError
from edgeseg.spec import IMAGENET_MEAN, IMAGENET_STD, ModelRequest, Preprocess

torch = pytest.importorskip("torch")
from edgeseg.convert.architectures import import_smp  # noqa: E402  these need torch
from edgeseg.convert.evidence import normalized  # noqa: E402
from edgeseg.convert.load import load_model, wrap_module  # noqa: E402

smp = import_smp()
nn = torch.nn
pytestmark = pytest.mark.integration

FILES = sorted((sample_folder() / "calib" / "images").iterdir())
MILLI = 1.0 / 255.0


def photos(part: slice) -> list[NDArray[np.uint8]]:
    return [np.asarray(Image.open(path).convert("RGB")) for path in FILES[part]]


def user_images(channels: int) -> list[NDArray[np.uint8]]:
    assert channels == 3
    return photos(slice(0, 4))


def preprocess(mean: tuple[float, ...], std: tuple[float, ...], scale: float) -> Preprocess:
    return Preprocess(mean * (3 // len(mean)), std * (3 // len(std)), scale)


class Norm(nn.Module):  # type: ignore[misc, name-defined]
    """Normalizes by itself, with numbers in its code."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Any) -> Any:
        return self.net((x - 0.5) / 0.25)


class Example(nn.Module):  # type: ignore[misc, name-defined]
    """SMP's own training example: ImageNet's numbers as buffers, whatever the scale of the images."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.model = net
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def forward(self, x: Any) -> Any:
        return self.model((x - self.mean) / self.std)


def trained(behind: Preprocess, around: Any = None) -> Any:
    """A network whose batch norms saw other photos than the user's, behind ``behind``."""
    torch.manual_seed(0)
    net = smp.Unet("resnet18", encoder_weights=None, classes=3, decoder_channels=(32, 16, 8, 8, 8))
    module = around(net) if around is not None else net
    module.train()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0  # one step leaves the statistics of its images
    images = np.stack([np.asarray(Image.fromarray(p).resize((64, 64))) for p in photos(slice(20, 26))])
    with torch.no_grad():
        module(normalized(images, behind))
    return module.eval()


CASES = {
    "imagenet": preprocess(IMAGENET_MEAN, IMAGENET_STD, MILLI),
    "0..1": preprocess((0.0,), (1.0,), MILLI),
    "0..255": preprocess((0.0,), (1.0,), 1.0),
    "example with 0..255": preprocess(IMAGENET_MEAN, IMAGENET_STD, 1.0),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_batch_norm_tells_the_normalization(case: str) -> None:
    truth = CASES[case]
    loaded = wrap_module(trained(truth), ModelRequest(), user_images)
    chosen = loaded.preprocess
    assert (chosen.mean, chosen.std, chosen.scale) == (truth.mean, truth.std, truth.scale)
    assert "first batch norm" in chosen.source
    told = [note for note in loaded.notes if "the network's first batch norm fits the images given when" in note]
    assert bool(told) == (case != "imagenet"), loaded.notes


@pytest.mark.parametrize("scale", [MILLI, 1.0])
def test_smps_example_module_is_told_apart_by_its_scale(scale: float, tmp_path: Path) -> None:
    """SMP issue 1224: the buffers say 0..1, the data set gave 0..255."""
    module = trained(preprocess((0.0,), (1.0,), scale), Example)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "e.ckpt")
    request = ModelRequest(
        arch="unet",
        encoder="resnet18",
        weights=str(tmp_path / "e.ckpt"),
        model_args={"decoder_channels": [32, 16, 8, 8, 8]},
    )
    for loaded in (wrap_module(module, ModelRequest(), user_images), load_model(request, user_images)):
        assert loaded.preprocess.scale == scale
        assert loaded.preprocess.mean == pytest.approx(IMAGENET_MEAN)
    # Without images nothing tells, and this is said; the user can.
    blind = load_model(request)
    assert blind.preprocess.scale == MILLI
    (note,) = [n for n in blind.notes if "assumed" in n]
    assert "images are divided by 255, then normalized with mean 0.485, 0.456, 0.406" in note
    assert "--scale 1" in note
    said = load_model(ModelRequest(**{**vars(request), "scale": 1.0}), user_images)
    assert said.preprocess.scale == 1.0
    assert said.preprocess.mean == pytest.approx(IMAGENET_MEAN)


def test_a_module_that_normalizes_by_itself_gets_nothing_in_front_or_a_note() -> None:
    module = trained(preprocess((0.0,), (1.0,), MILLI), Norm)
    loaded = wrap_module(module, ModelRequest(), user_images)
    assert (loaded.preprocess.mean, loaded.preprocess.std, loaded.preprocess.scale) == ((0.0,) * 3, (1.0,) * 3, MILLI)
    blind = wrap_module(module, ModelRequest())
    assert blind.preprocess.mean == IMAGENET_MEAN
    (note,) = [n for n in blind.notes if "the whole of Norm is converted; before it, images are divided by 255" in n]
    assert "--mean 0 --std 1" in note


def test_real_training_is_recognized() -> None:
    """The demo model was trained behind ImageNet's normalization, which is not timm's for its encoder."""
    arch = "fpn"
    demo = load_model(ModelRequest(arch=arch))
    _, weights = demo_files(arch)
    request = ModelRequest(
        arch=arch, encoder=demo.model.encoder, weights=str(weights), model_args=dict(demo.model.model_args)
    )
    loaded = load_model(request, user_images)
    assert (loaded.preprocess.mean, loaded.preprocess.std) == (demo.preprocess.mean, demo.preprocess.std)
    assert loaded.preprocess.scale == demo.preprocess.scale
    assert "first batch norm" in loaded.preprocess.source


def test_what_is_said_counts_and_a_contradiction_is_noted() -> None:
    module = trained(CASES["0..255"])
    said = wrap_module(module, ModelRequest(mean=(0.0,), std=(1.0,), scale=MILLI), user_images)
    assert said.preprocess.scale == MILLI
    assert not any("batch norm" in note for note in said.notes)
    unsaid = wrap_module(module, ModelRequest(mean=(0.0,), std=(1.0,)), user_images)
    assert unsaid.preprocess.scale == MILLI
    assert any("when images keep their values 0..255" in note and "--scale" in note for note in unsaid.notes)
    with pytest.raises(
        SpecError, match="--scale 1 was given, and neither mean nor std is recorded; give --mean and --std"
    ):
        wrap_module(module, ModelRequest(scale=1.0))
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(SpecError, match="scale is"):
            ModelRequest(scale=scale)
