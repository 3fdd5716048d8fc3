"""Weights of SMP 0.4 and older become the network that was trained, where SMP 0.5 builds another of the same tensors.

Oracle: the real old versions. ``RECORDED`` holds outputs of SMP 0.4.0 (those of 0.2.1 and 0.3.4 are the same) and 0.5.0
for the weights and the image below, recorded so: install segmentation-models-pytorch 0.4.0 with timm 0.9.16 in a folder
of its own (``pip install --target OLD``), and with that folder first in PYTHONPATH evaluate, for each architecture and
encoder,
``model.load_state_dict(made_up(model.state_dict())); model.eval()(image())[0, :, 40::80, 48::96].flatten()`` with
``encoder_weights=None, classes=2``.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edgeseg.errors import CheckpointError, SpecError
from edgeseg.spec import ModelRequest

torch = pytest.importorskip("torch")
from edgeseg.convert.architectures import import_smp  # noqa: E402  these need torch
from edgeseg.convert.load import load_model  # noqa: E402
from edgeseg.silence import without_warnings  # noqa: E402  these need torch

smp = import_smp()
pytestmark = pytest.mark.integration

# (architecture, encoder): the outputs of SMP 0.4.0 and of 0.5.0.
RECORDED = {
    ("deeplabv3", "timm-mobilenetv3_small_minimal_100"): (
        (-0.13397, -0.12974, -0.13403, -0.1364, -0.00052, 0.00358, 0.01151, -0.00967),
        (0.01873, 0.02065, 0.02353, 0.024, 0.05299, 0.04877, 0.05743, 0.0615),
    ),
    ("pan", "timm-mobilenetv3_large_075"): (
        (0.01487, 0.00267, 0.0008, 0.00807, 0.0325, 0.05916, 0.05054, 0.05271),
        (0.01462, 0.00228, 0.00072, 0.00778, 0.03286, 0.05955, 0.0507, 0.05296),
    ),
    ("deeplabv3plus", "timm-mobilenetv3_small_100"): (
        (-0.03678, -0.04312, -0.03733, -0.03744, 0.13442, 0.12637, 0.12526, 0.13127),
        (-0.0367, -0.04288, -0.03734, -0.03724, 0.13422, 0.12626, 0.12518, 0.13109),
    ),
    ("deeplabv3", "timm-regnetx_002"): (
        (-0.22075, -0.20443, -0.19916, -0.21925, -0.06436, -0.06072, -0.04613, -0.06206),
        (0.00919, -0.00014, 0.01382, 0.00265, 0.07033, 0.07409, 0.07166, 0.06561),
    ),
    ("pan", "timm-regnety_002"): (
        (0.06189, 0.0474, 0.10233, 0.01313, -0.00349, 0.05691, 0.01321, 0.00335),
        (0.06217, 0.0476, 0.10241, 0.01307, -0.00402, 0.05657, 0.01241, 0.00297),
    ),
    ("deeplabv3plus", "timm-gernet_s"): (
        (0.05676, 0.03616, 0.02975, 0.02234, 0.13749, 0.16754, 0.14857, 0.15225),
        (0.05602, 0.03599, 0.03017, 0.02227, 0.13803, 0.16821, 0.15002, 0.1541),
    ),
}

# fpn with xception: the outputs of SMP 0.1.0 (with pretrainedmodels 0.7.4), recorded the same way, and of 0.1.3 to 0.6.0.
FIRST_XCEPTION = (
    (-0.18694, -0.08437, -0.06502, -0.3531, 1.61522, 0.88185, 0.624, 0.11616),
    (-0.10321, -0.01711, -0.22457, -0.6285, 1.81378, 0.84751, 0.60993, 0.40255),
)


def made_up(state: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors for these names and shapes, the same on every machine: a hash of index and name."""
    filled = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            filled[name] = tensor
            continue
        old_name = name.removeprefix("encoder.").removeprefix("model.").replace("stages_", "stages.")
        seed = zlib.crc32(old_name.encode()) % 1000
        index = torch.arange(tensor.numel(), dtype=torch.float64)
        noise = torch.frac(torch.sin(index * 12.9898 + seed) * 43758.5453).abs()
        if tensor.dim() > 1:
            values = (noise - 0.5) * (8 / tensor[0].numel()) ** 0.5
        elif name.endswith(("running_var", "weight")):
            values = 0.5 + noise
        else:
            values = (noise - 0.5) / 5
        filled[name] = values.reshape(tensor.shape).float()
    return filled


def image() -> Any:
    y, x = torch.meshgrid(torch.arange(160.0), torch.arange(192.0), indexing="ij")
    return torch.stack([torch.sin(x / 9 + y / 5), torch.cos(x / 4 - y / 7), torch.sin(x * y / 400)])[None]


def weights(arch: str, encoder: str, *, old_names: bool) -> dict[str, Any]:
    """A state dict under SMP 0.5's names, or SMP 0.4's."""
    with without_warnings():
        state = dict(smp.create_model(arch, encoder, encoder_weights=None, classes=2).state_dict())
    renamed = {}
    if old_names and arch == "deeplabv3":
        renamed = {"decoder.aspp.": "decoder.0.", "decoder.conv.": "decoder.1.", "decoder.bn.": "decoder.2."}
    if old_names and "mobilenetv3" not in encoder:
        renamed |= {"encoder.model.": "encoder.", "encoder.stages_": "encoder.stages."}
    for new, old in renamed.items():
        state = {old + k.removeprefix(new) if k.startswith(new) else k: v for k, v in state.items()}
    return made_up(state)


def outputs(path: Path, arch: str, encoder: str, **model_args: Any) -> tuple[Any, Any]:
    """The loaded model, and what it returns where the recorded ones were read."""
    loaded = load_model(ModelRequest(arch=arch, encoder=encoder, weights=str(path), model_args=model_args))
    with torch.no_grad():
        return loaded, loaded.module(image())[0, :, 40::80, 48::96].flatten()


@pytest.mark.parametrize(("arch", "encoder"), RECORDED)
def test_an_old_network_is_built_of_old_weights_and_a_new_one_of_new(arch: str, encoder: str, tmp_path: Path) -> None:
    old, new = RECORDED[arch, encoder]
    for values, version in ((old, "0.4"), (new, "0.5")):
        path = tmp_path / f"{version}.pt"
        torch.save(weights(arch, encoder, old_names=version == "0.4"), path)
        # Without a version said, the tensors' names tell: only mobilenetv3's are the same in both.
        said = {"smp_version": version} if "mobilenetv3" in encoder else {}
        loaded, ours = outputs(path, arch, encoder, **said)
        assert ours.tolist() == pytest.approx(values, abs=3e-5)
        assert loaded.model.model_args == ({"smp_version": "0.4"} if version == "0.4" else {})
        assert any(n.startswith(f"{encoder} is dilated as SMP {version} and") for n in loaded.notes)


def test_the_xception_of_smp_0_1_0_is_built_when_it_is_said(tmp_path: Path) -> None:
    torch.save(weights("fpn", "xception", old_names=False), tmp_path / "w.pt")
    for said, values in (({"smp_version": "0.1.0"}, FIRST_XCEPTION[0]), ({}, FIRST_XCEPTION[1])):
        loaded, ours = outputs(tmp_path / "w.pt", "fpn", "xception", **said)
        assert ours.tolist() == pytest.approx(values, abs=3e-5)
        assert loaded.model.model_args == said
        assert any("xception leaves out block11" in n if said else "smp_version=0.1.0" in n for n in loaded.notes)
    # What every version builds the same needs no note.
    torch.save(weights("pspnet", "xception", old_names=False), tmp_path / "p.pt")
    assert not any("xception" in n for n in outputs(tmp_path / "p.pt", "pspnet", "xception")[0].notes)


def test_what_the_tensors_cannot_tell_is_asked_for(tmp_path: Path) -> None:
    encoder = "timm-mobilenetv3_small_minimal_100"
    torch.save(weights("deeplabv3", encoder, old_names=True), tmp_path / "w.pt")
    with pytest.raises(
        CheckpointError, match=r"give --model-arg smp_version=0\.4 \(0\.4 or older\) or smp_version=0\.5"
    ):
        outputs(tmp_path / "w.pt", "deeplabv3", encoder)
    with pytest.raises(SpecError, match="smp_version is 'old'; give the version"):
        outputs(tmp_path / "w.pt", "deeplabv3", encoder, smp_version="old")
    for version in (0.3, "0.3.4", "0.2.1"):
        assert outputs(tmp_path / "w.pt", "deeplabv3", encoder, smp_version=version)[0].model.model_args == {
            "smp_version": "0.4"
        }
    # Where every version builds the same network, none is asked for or recorded.
    torch.save(weights("unet", encoder, old_names=True), tmp_path / "u.pt")
    assert outputs(tmp_path / "u.pt", "unet", encoder, smp_version=0.4)[0].model.model_args == {}


def test_a_version_that_the_tensors_contradict_is_refused(tmp_path: Path) -> None:
    torch.save(weights("pan", "timm-regnetx_002", old_names=True), tmp_path / "w.pt")
    with pytest.raises(
        SpecError, match=r"smp_version=0\.6\.0 contradicts the checkpoint, which is of SMP 0\.4 and older"
    ):
        outputs(tmp_path / "w.pt", "pan", "timm-regnetx_002", smp_version="0.6.0")


def test_the_arguments_in_config_json_tell_the_version(tmp_path: Path) -> None:
    encoder = "timm-mobilenetv3_small_minimal_100"
    with without_warnings():
        made = smp.PAN(encoder, encoder_weights=None, classes=2)
    made.save_pretrained(tmp_path)
    assert load_model(ModelRequest(weights=str(tmp_path))).model.model_args == {}
    config = json.loads((tmp_path / "config.json").read_text())
    del config["decoder_interpolation"]  # SMP 0.4 had no such argument
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(ModelRequest(weights=str(tmp_path))).model.model_args == {"smp_version": "0.4"}


def test_the_upernet_of_smp_0_4_is_named(tmp_path: Path) -> None:
    state = weights("upernet", "resnet18", old_names=True)
    renamed = {k.replace("decoder.fpn_lateral_blocks.", "decoder.fpn_stages."): v for k, v in state.items()}
    torch.save(renamed, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"are of the UPerNet of SMP 0\.4, whose decoder is another network"):
        load_model(ModelRequest(encoder="resnet18", weights=str(tmp_path / "w.pt")))
