"""Architectures, encoders, arguments, sizes and preprocessing of loaded models; SMP and timm are the oracles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeseg.demo import demo_models
from edgeseg.errors import CheckpointError, SpecError
from edgeseg.spec import ARCHITECTURES, IMAGENET_MEAN, IMAGENET_STD, ModelRequest

torch = pytest.importorskip("torch")
from local_hub import Hub, local_hub  # noqa: E402  these need torch

from edgeseg.convert.architectures import import_smp  # noqa: E402
from edgeseg.convert.load import load_model  # noqa: E402
from edgeseg.convert.loaded import LoadedModel  # noqa: E402
from edgeseg.convert.reparameterize import merge_branches  # noqa: E402
from edgeseg.silence import without_warnings  # noqa: E402

smp = import_smp()
pytestmark = pytest.mark.integration

TINY = "mobilenet_v2"
# The decoder of dpt is 90 MB by default; its shape is all that matters here.
SMALL_DPT = {"decoder_intermediate_channels": [16, 16, 16, 16], "decoder_fusion_channels": 16}


def tiny_request(arch: str, **fields: Any) -> ModelRequest:
    request = ModelRequest(arch=arch, weights="random", classes=3)
    if arch == "dpt":
        request = replace(request, model_args=SMALL_DPT)
    else:
        request = replace(request, encoder=TINY)
    return replace(request, **fields)


def run(loaded: LoadedModel, height: int, width: int) -> Any:
    with torch.no_grad():
        return loaded.module(torch.zeros(1, loaded.model.in_channels, height, width))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_loads_and_its_size_multiple_is_true(arch: str) -> None:
    loaded = load_model(tiny_request(arch))
    module, stride = loaded.module, loaded.stride
    assert not module.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in module.parameters())
    assert (loaded.model.arch, loaded.model.classes, loaded.model.task) == (arch, 3, "multiclass")
    # PAN pools the encoder's last features three times more: below 128 pixels nothing is left.
    least = (144 if arch == "pan" else 33) // stride + 1
    height, width = least * stride, (least + 3) * stride
    assert tuple(run(loaded, height, width).shape) == (1, 3, height, width)
    loaded.check_size(height, width)
    loaded.check_size(*loaded.size)
    if stride > 1:
        # Half the multiple must not do, or it would be a stricter rule than the network's.
        height = least * stride + stride // 2
        try:
            shape = tuple(run(loaded, height, height).shape[2:])
        except RuntimeError:
            shape = ()
        assert shape != (height, height)
        with pytest.raises(SpecError, match=f"multiples of {stride} do; nearest is"):
            loaded.check_size(height, height)


def test_random_weights_are_loud_and_the_same_every_time() -> None:
    first, second = (load_model(tiny_request("unet")) for _ in range(2))
    assert first.notes[0].startswith("RANDOM WEIGHTS")
    assert first.weights_sha256 == second.weights_sha256
    state = torch.get_rng_state()
    load_model(tiny_request("unet"))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("channels", [1, 3, 4, 6])
@pytest.mark.parametrize("encoder", [TINY, "tu-mobilenetv3_small_050"])
def test_any_number_of_input_channels(channels: int, encoder: str) -> None:
    loaded = load_model(tiny_request("fpn", encoder=encoder, in_channels=channels))
    assert tuple(run(loaded, 64, 96).shape) == (1, 3, 64, 96)
    assert len(loaded.preprocess.mean) == len(loaded.preprocess.std) == channels


def test_scse_and_old_spellings_of_arguments() -> None:
    args = {"decoder_attention_type": "scse", "decoder_use_batchnorm": False, "decoder_channels": [32, 32, 16, 16, 16]}
    loaded = load_model(tiny_request("unet", model_args=args))
    assert any("SCSEModule" in type(m).__name__ for m in loaded.module.modules())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in loaded.module.decoder.modules())
    assert loaded.model.model_args == {
        "decoder_attention_type": "scse",
        "decoder_use_norm": False,
        "decoder_channels": [32, 32, 16, 16, 16],
    }
    assert "model argument decoder_use_batchnorm is called decoder_use_norm now" in loaded.notes


def test_pspnet_takes_other_pyramid_sizes() -> None:
    loaded = load_model(tiny_request("pspnet", model_args={"psp_sizes": [1, 2, 4, 5, 8]}))
    assert [block.pool_size for block in loaded.module.decoder.psp.blocks] == [1, 2, 4, 5, 8]
    assert tuple(run(loaded, 72, 96).shape) == (1, 3, 72, 96)
    usual = load_model(tiny_request("pspnet", model_args={"psp_sizes": [1, 2, 3, 6]})).module
    original = load_model(tiny_request("pspnet")).module
    original.load_state_dict(usual.state_dict())
    image = torch.rand(1, 3, 64, 64)
    assert torch.equal(original(image), usual(image))


def test_an_output_smaller_than_the_image_is_enlarged() -> None:
    loaded = load_model(tiny_request("fpn", model_args={"upsampling": 1}))
    assert tuple(run(loaded, 64, 96).shape) == (1, 3, 64, 96)
    assert "the network's output is 1/4 of its input's size; enlarged bilinearly, as SMP's head does" in loaded.notes
    # SMP's own head, with its factor 4, is the same thing.
    original = load_model(tiny_request("fpn")).module
    original.load_state_dict(loaded.module.state_dict())
    image = torch.rand(1, 3, 64, 96)
    assert torch.allclose(original(image), loaded.module(image), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder": "resnt50"}, r"unknown encoder 'resnt50'; did you mean 'resnet50'"),
        ({"encoder": "tu-resnt50"}, r"did you mean 'tu-resnet50'"),
        ({"encoder": "efficientnet_b4"}, r"for timm's write 'tu-efficientnet_b4', for SMP's 'efficientnet-b4'"),
        ({"encoder": "mobilenetv3_large_100"}, r"for timm's write 'tu-mobilenetv3_large_100'"),
        ({"arch": "dpt", "encoder": "resnet50"}, r"dpt takes timm's encoders only.*tu-vit_tiny_patch16_224"),
        ({"arch": "unetplusplus", "encoder": "mit_b0"}, r"unetplusplus cannot take mit_b0 .* use unet"),
        ({"arch": "linknet", "encoder": "mit_b0"}, r"linknet cannot take mit_b0"),
        ({"arch": "deeplabv3", "encoder": "vgg11"}, r"needs an encoder that can be dilated, vgg11 cannot"),
        ({"arch": "pan", "encoder": "densenet121"}, r"or --model-arg encoder_output_stride=32"),
        ({"arch": "deeplabv3plus", "encoder": "tu-ghostnet_050"}, r"tu-ghostnet_050 cannot; use a resnet"),
        ({"arch": "fpn", "encoder": "tu-vit_tiny_patch16_224"}, r"vision transformers go with dpt"),
        ({"model_args": {"decoder_chanels": 3}}, r"fpn has no argument 'decoder_chanels'; .*accepted: encoder_depth"),
        ({"model_args": {"classes": 3}}, r"'classes' has an option of its own; use --classes"),
        ({"model_args": {"encoder_name": "x"}}, r"use --encoder"),
        ({"model_args": {"encoder_depth": 9}}, r"SMP cannot build fpn .*depth"),
        (
            {"encoder": "tu-mobilenetv3_small_050", "model_args": {"nonsense": 1}},
            r"fpn has no argument 'nonsense' .*timm's: img_size",
        ),
        ({"arch": "unet", "model_args": {"decoder_use_norm": "instancenorm"}}, r'give --model-arg .*"affine": true'),
        ({"arch": "pspnet", "model_args": {"psp_sizes": [0]}}, r"psp_sizes is \[0\]; give positive whole numbers"),
        ({"activation": "relu"}, r"unknown activation 'relu'"),
        ({"classes": 2, "task": "binary"}, r"task binary has 1 class, got 2"),
        ({"classes": 2, "class_names": ("a", "b", "c")}, r"3 class names for 2 classes"),
        ({"arch": None}, r"no architecture given; give --arch"),
        ({"in_channels": 0}, r"in_channels is 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        load_model(tiny_request(fields.pop("arch", "fpn"), **fields))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 450


@pytest.mark.parametrize("arch", ["fpn", "linknet", "deeplabv3", "pan"])
def test_an_encoder_is_refused_exactly_when_smp_cannot_build_it(arch: str) -> None:
    families = {entry["encoder"]: name for name, entry in reversed(smp.encoders.encoders.items())}
    for encoder in families.values():
        device = "cpu" if encoder.startswith("mit_b") else "meta"  # mit computes on values while it is built
        try:
            with torch.device(device), without_warnings():
                smp.create_model(arch, encoder, encoder_weights=None)
            possible = True
        except ValueError:
            possible = False
        try:
            from edgeseg.convert.architectures import resolve_encoder

            assert resolve_encoder(encoder.upper(), arch, {}) == encoder
            assert possible, f"{encoder} was accepted"
        except SpecError:
            assert not possible, f"{encoder} was refused"


@pytest.mark.parametrize(
    ("arch", "encoder"),
    [
        ("unet", "mit_b0"),
        ("segformer", "mit_b0"),
        ("deeplabv3plus", "mit_b0"),
        ("pspnet", "mobileone_s0"),
        ("unet", "timm-mobilenetv3_small_100"),
        ("upernet", "tu-convnext_atto"),
        ("manet", "tu-regnetx_002"),
    ],
)
def test_encoders_of_other_families_run_at_their_size_multiple(arch: str, encoder: str) -> None:
    loaded = load_model(ModelRequest(arch=arch, encoder=encoder, classes=2, weights="random"))
    side = 2 * max(32, loaded.stride)
    assert tuple(run(loaded, side, side + loaded.stride).shape) == (1, 2, side, side + loaded.stride)


def test_an_encoder_of_one_size_says_so_and_takes_another_by_argument() -> None:
    encoder = "tu-coatnet_pico_rw_224"
    loaded = load_model(tiny_request("fpn", encoder=encoder))
    assert (loaded.fixed_size, loaded.size) == ((224, 224), (224, 224))
    loaded.check_size(224, 224)
    with pytest.raises(SpecError, match="takes 224x224 only, got 256x256; give --size 224x224"):
        loaded.check_size(256, 256)
    other = load_model(tiny_request("fpn", encoder=encoder, model_args={"img_size": 64}))
    assert tuple(run(other, 64, 64).shape) == (1, 3, 64, 64)


def test_an_encoder_that_takes_no_more_than_its_own_size_is_built_with_it() -> None:
    """MViTv2's relative positions are known up to 224x224; smaller images pass."""
    loaded = load_model(ModelRequest(arch="fpn", encoder="tu-mvitv2_tiny", weights="random"))
    assert (loaded.fixed_size, loaded.size) == (None, (224, 224))


def test_dpt_takes_any_size_unless_told_otherwise() -> None:
    fixed = load_model(tiny_request("dpt", model_args={**SMALL_DPT, "dynamic_img_size": False}))
    assert fixed.fixed_size == (224, 224)
    free = load_model(tiny_request("dpt"))
    assert free.fixed_size is None
    fixed.module.load_state_dict(free.module.state_dict())
    image = torch.rand(1, 3, 224, 224)
    assert torch.equal(fixed.module(image), free.module(image))


@pytest.mark.parametrize(
    ("encoder", "mean", "std"),
    [
        ("resnet18", IMAGENET_MEAN, IMAGENET_STD),
        ("dpn68", (124 / 255, 117 / 255, 104 / 255), (1 / (0.0167 * 255),) * 3),
        ("xception", (0.5,) * 3, (0.5,) * 3),
        ("timm-tf_efficientnet_lite0", (0.5,) * 3, (0.5,) * 3),
        ("timm-efficientnet-b0", IMAGENET_MEAN, IMAGENET_STD),
        ("tu-tf_efficientnet_lite0", (0.5,) * 3, (0.5,) * 3),
        ("tu-resnet18", IMAGENET_MEAN, IMAGENET_STD),
        ("timm-mobilenetv3_small_100", IMAGENET_MEAN, IMAGENET_STD),
    ],
)
def test_preprocessing_is_the_encoders(encoder: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    loaded = load_model(tiny_request("unet", encoder=encoder))
    assert loaded.preprocess.mean == pytest.approx(mean)
    assert loaded.preprocess.std == pytest.approx(std)
    assert (loaded.preprocess.scale, loaded.preprocess.channel_order) == (1 / 255, "rgb")
    assert "settings for" in loaded.preprocess.source


def test_preprocessing_given_by_the_user_wins_and_an_unknown_one_is_noted() -> None:
    given = load_model(tiny_request("unet", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), channel_order="bgr"))
    assert given.preprocess.mean == (0.1, 0.2, 0.3)
    assert given.preprocess.channel_order == "bgr"
    swapped = load_model(tiny_request("unet", channel_order="bgr"))
    assert swapped.preprocess.mean == IMAGENET_MEAN[::-1]
    unknown = load_model(tiny_request("unet", encoder="tu-mobilenetv4_conv_small_035"))
    assert unknown.preprocess.mean == IMAGENET_MEAN
    assert any("nothing is known about the normalization" in n for n in unknown.notes)
    grey = load_model(tiny_request("unet", in_channels=1))
    assert grey.preprocess.mean == pytest.approx((sum(IMAGENET_MEAN) / 3,))
    assert any("1 input channel" in n for n in grey.notes)


@pytest.mark.parametrize("arch", demo_models() or [pytest.param("", marks=pytest.mark.skip("no demo models here"))])
def test_demo_models_load_and_are_not_taken_for_another_model(arch: str) -> None:
    loaded = load_model(ModelRequest(arch=arch))
    assert loaded.is_demo
    assert len(loaded.model.class_names) == loaded.model.classes
    assert loaded.notes[0].startswith("no weights given: the demo model is used")
    assert tuple(run(loaded, *loaded.size).shape) == (1, loaded.model.classes, *loaded.size)
    for field in (
        {"encoder": "resnet50"},
        {"classes": 3},
        {"activation": "sigmoid"},
        {"model_args": {"upsampling": 8}},
    ):
        with pytest.raises(SpecError, match="the demo .* is another model .*give --weights PATH"):
            load_model(ModelRequest(arch=arch, **field))


def test_an_architecture_without_a_demo_model_needs_weights() -> None:
    assert "linknet" not in demo_models()
    with pytest.raises(SpecError, match=r"no weights given, and linknet has no demo model .*random"):
        load_model(ModelRequest(arch="linknet"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine that has random weights for ``mobilenet_v2``, and an empty cache."""
    from safetensors.torch import save

    encoder = smp.encoders.get_encoder(TINY, weights=None)
    files = {"config.json": b"{}", "model.safetensors": save(encoder.state_dict())}
    with local_hub(monkeypatch, tmp_path, files) as running:
        yield running


def test_pretrained_encoder_weights_are_fetched_then_found_in_the_cache(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load

    request = ModelRequest(arch="unet", encoder=TINY, weights="imagenet", classes=2)
    loaded = load_model(request)
    expected = load(hub.files["model.safetensors"])
    state = loaded.module.encoder.state_dict()
    assert all(torch.equal(state[k], v) for k, v in expected.items())
    assert "DECODER IS RANDOM" in loaded.notes[0]
    # From here on the hub must not be asked: its address leads nowhere.
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    assert load_model(request).weights_sha256 == loaded.weights_sha256


@pytest.mark.parametrize("encoder", ["resnet18", "tu-resnet18"])
def test_pretrained_weights_out_of_reach_say_what_to_do(
    encoder: str, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    request = ModelRequest(arch="unet", encoder=encoder, weights="imagenet")
    hub.files = {}
    with pytest.raises(
        CheckpointError, match=r"are not cached and http.*has it not, or not for you.*; give --weights PATH"
    ):
        load_model(request)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set; unset it"):
        load_model(request)


@pytest.mark.parametrize("encoder", ["mobileone_s0", "tu-repvgg_a0"])
def test_training_branches_are_merged_without_changing_the_result(encoder: str) -> None:
    module = load_model(tiny_request("fpn", encoder=encoder)).module.train()
    with torch.no_grad():
        module(torch.rand(2, 3, 64, 64))
    module.eval()
    merged, saved = merge_branches(module, 3, 64)
    image = torch.rand(1, 3, 96, 64)
    assert saved > 20
    assert torch.allclose(merged(image), module(image), atol=1e-4)
    plain = load_model(tiny_request("fpn")).module
    assert merge_branches(plain, 3, 64) == (plain, 0)


def test_a_merge_that_changes_the_result_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_model(tiny_request("fpn", encoder="mobileone_s0")).module
    block = type(next(m for m in module.modules() if hasattr(m, "rbr_conv")))
    right = block.reparameterize

    def wrong(self: Any) -> None:
        right(self)
        self.reparam_conv.weight.data.mul_(1.1)

    monkeypatch.setattr(block, "reparameterize", wrong)
    assert merge_branches(module, 3, 64) == (module, 0)


def test_an_encoder_without_pretrained_weights_says_which_it_has(hub: type[Hub]) -> None:
    with pytest.raises(SpecError, match=r"dpn92 has no pretrained weights 'imagenet' \(it has: imagenet\+5k\)"):
        load_model(ModelRequest(arch="unet", encoder="dpn92", weights="imagenet"))
