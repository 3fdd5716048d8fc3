"""Checkpoints in every container, and files that are damaged, foreign or hostile.

Oracle: the model that wrote the file. A hostile file must end in a ``CheckpointError``, in one line, without running
what it carries and without filling memory.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import pathlib
import pickle
import struct
import types
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeseg.errors import CheckpointError, SpecError
from edgeseg.spec import ModelRequest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402  these need torch
from torch.nn.utils import prune  # noqa: E402

from edgeseg.convert.architectures import import_smp  # noqa: E402
from edgeseg.convert.fit import ARCH_MARKERS, guess_arch  # noqa: E402
from edgeseg.convert.load import load_model  # noqa: E402
from edgeseg.silence import without_warnings  # noqa: E402

smp = import_smp()
pytestmark = pytest.mark.integration

ENCODER = "mobilenet_v2"
ARGS = {"decoder_pyramid_channels": 16, "decoder_segmentation_channels": 32}


@pytest.fixture(scope="module")
def model() -> Any:
    """A small FPN whose batch norms have statistics of their own."""
    torch.manual_seed(3)
    made = smp.FPN(ENCODER, encoder_weights=None, classes=4, **ARGS)
    made.train()
    with torch.no_grad():
        made(torch.rand(2, 3, 64, 64))
    return made.eval()


@pytest.fixture(scope="module")
def state(model: Any) -> dict[str, Any]:
    """Its state dict."""
    return dict(model.state_dict())


def asked(path: Path, **fields: Any) -> ModelRequest:
    """The right request for ``model``'s weights in ``path``."""
    return ModelRequest(**{"arch": "fpn", "encoder": ENCODER, "model_args": ARGS, "weights": str(path), **fields})


def assert_same(model: Any, request: ModelRequest) -> Any:
    """The loaded module computes what the model that wrote the file computes."""
    loaded = load_model(request)
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded.module(image), model(image))
    return loaded


def prefixed(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + k: v for k, v in state.items()}


CONTAINERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer": {"lr": 0.1}},
    "model": lambda s: {"model": s},
    "model. prefix": lambda s: prefixed(s, "model."),
    "module. prefix": lambda s: prefixed(s, "module."),
    "net. prefix": lambda s: prefixed(s, "net."),
    "odd prefix": lambda s: prefixed(s, "trainer.student."),
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "compiled within": lambda s: prefixed(s, "model._orig_mod."),
    "lightning": lambda s: {
        "state_dict": {**prefixed(s, "model."), "loss_fn.weight": torch.ones(2)},
        "hyper_parameters": {"arch": "FPN", "encoder_name": ENCODER, "lr": 1e-3},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.7)}},
    },
    "trainer leftovers": lambda s: {
        "state_dict": s,
        "args": argparse.Namespace(lr=0.1, data=pathlib.PosixPath("/data")),
        "best_iou": np.float64(0.7),
        "best_loss": np.float32(0.1),
    },
    "harmless hyper-parameters": lambda s: {
        "state_dict": s,
        "hyper_parameters": {
            "weights": np.array([1.0, 2.0]),
            "names": np.array(["road", "car"]),
            "counts": collections.defaultdict(list, {"a": [1]}),
            "last": collections.deque([1, 2], maxlen=3),
            "started": datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc),
            "space": types.SimpleNamespace(lr=0.1),
            "steps": range(3),
            "part": slice(1, 2),
        },
    },
    "of Windows": lambda s: {"state_dict": s, "data": pathlib.PureWindowsPath("C:/data")},
    "network": lambda s: {"network": s},
    "state": lambda s: {"state": s},
    "a name of its own": lambda s: {"best_model": s, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "three deep": lambda s: {"run": {"last": {"weights": s}}, "scheduler": {"state": {"last": torch.ones(1)}}},
    "beside other tensors": lambda s: {"state": {"step": torch.ones(1)}, "segmenter": s},
    "ema only": lambda s: {"ema": s},
    "params_ema only": lambda s: {"params_ema": s},
    "beside averaged ones": lambda s: {"state_dict_ema": {k: v * 0 for k, v in s.items()}, "state_dict": s},
    "averaged ones within": lambda s: {"model": {"ema": {k: v * 0 for k, v in s.items()}, "net": s}},
    "teacher and student": lambda s: {
        **prefixed({k: v * 0 for k, v in s.items()}, "ema_model."),
        **prefixed(s, "model."),
    },
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_weights_are_the_same_from_every_container(
    container: str, model: Any, state: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "weights.pt"
    torch.save(CONTAINERS[container](state), path)
    loaded = assert_same(model, asked(path))
    assert loaded.model.classes == 4
    assert "classes not given: 4, by the shape of the checkpoint's segmentation head" in loaded.notes
    stripped = [n for n in loaded.notes if n.startswith("stripped")]
    assert bool(stripped) == (
        "prefix" in container or container in ("compiled", "compiled within", "lightning", "teacher and student")
    )
    assert loaded.weights == f"weights of {path}"


def test_averaged_weights_are_told_and_taken_when_asked_for(model: Any, state: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": {k: v * 0 for k, v in state.items()}, "state_dict_ema": state}, path)
    said = (
        "the weights under 'state_dict' are used; averaged ones are under 'state_dict_ema': --weights-key takes those"
    )
    assert said in load_model(asked(path)).notes
    assert_same(model, asked(path, weights_key="state_dict_ema"))
    with pytest.raises(CheckpointError, match=r"no state dict under 'ema' \(it has: state_dict, state_dict_ema\)"):
        load_model(asked(path, weights_key="ema"))
    torch.save({"model": {k: v * 0 for k, v in state.items()}, "best": state}, path)
    said = "the weights under 'model' are used; others are under 'best': --weights-key takes those"
    assert said in load_model(asked(path)).notes
    assert_same(model, asked(path, weights_key="best"))
    torch.save({"first": state, "second": state}, path)
    with pytest.raises(
        CheckpointError, match=r"holds 2 state dicts, under 'first', 'second'; say which with --weights"
    ):
        load_model(asked(path))
    torch.save({"ema": state}, path)
    assert "averaged weights are used, those under 'ema': there are no others" in load_model(asked(path)).notes
    with pytest.raises(SpecError, match="but the weights are no checkpoint file"):
        load_model(asked(path, weights="random", weights_key="ema"))


def test_the_hash_is_of_the_weights_not_of_the_file(model: Any, state: dict[str, Any], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "a.pt")
    torch.save({"state_dict": prefixed(state, "model.")}, tmp_path / "b.ckpt", _use_new_zipfile_serialization=False)
    save_file({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, tmp_path / "c.safetensors")
    model.save_pretrained(tmp_path / "d")
    hashes = {
        assert_same(model, asked(tmp_path / name)).weights_sha256 for name in ("a.pt", "b.ckpt", "c.safetensors", "d")
    }
    assert len(hashes) == 1
    changed = {**state, "segmentation_head.0.bias": state["segmentation_head.0.bias"] + 1e-6}
    torch.save(changed, tmp_path / "e.pt")
    assert load_model(asked(tmp_path / "e.pt")).weights_sha256 not in hashes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_cast_with_a_note(dtype: Any, state: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_file({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, path)
    loaded = load_model(asked(path))
    name = str(dtype).removeprefix("torch.")
    assert f"weights cast from {name} to float32" in loaded.notes
    for key, value in loaded.module.state_dict().items():
        expected = state[key].to(dtype).float() if value.is_floating_point() else state[key]
        assert torch.equal(value, expected)


def test_a_save_pretrained_folder_says_everything_itself(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    loaded = assert_same(model, ModelRequest(weights=str(tmp_path / "saved")))
    assert (loaded.model.arch, loaded.model.encoder, loaded.model.classes) == ("fpn", ENCODER, 4)
    assert loaded.model.model_args == ARGS
    beside = assert_same(model, ModelRequest(weights=str(tmp_path / "saved" / "model.safetensors")))
    assert "read from config.json beside model.safetensors" in beside.notes[0]
    with pytest.raises(SpecError, match="--classes 9 contradicts the checkpoint's config.json, which says 4"):
        load_model(ModelRequest(weights=str(tmp_path / "saved"), classes=9))
    (tmp_path / "saved" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "saved" / "pytorch_model.bin")
    assert_same(model, ModelRequest(weights=str(tmp_path / "saved")))


@pytest.mark.parametrize("place", ["", "model.safetensors"])
def test_a_folder_of_a_subclass_is_read_off_the_tensors_once_its_architecture_is_said(
    place: str, tmp_path: Path
) -> None:
    class Ours(smp.FPN):  # type: ignore[misc, name-defined]
        def __init__(self, labels: int = 3) -> None:
            super().__init__(ENCODER, encoder_weights=None, classes=labels)

    made = Ours().eval()
    made.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"is of the class 'Ours', which is not SMP's; .*give --arch"):
        load_model(ModelRequest(weights=str(tmp_path / place)))
    loaded = assert_same(made, ModelRequest(weights=str(tmp_path / place), arch="fpn"))
    assert any("config.json is of the class 'Ours'" in note for note in loaded.notes)


def test_clamped_values_are_what_config_and_settings_say(tmp_path: Path) -> None:
    made = smp.Unet(ENCODER, encoder_weights=None, classes=3, activation="clamp").eval()
    made.save_pretrained(tmp_path)
    assert assert_same(made, ModelRequest(weights=str(tmp_path))).model.activation == "clamp"
    settings = {"arch": "unet", "encoder_name": ENCODER, "activation": "clamp"}
    torch.save({"state_dict": made.state_dict(), "hyper_parameters": settings}, tmp_path / "a.ckpt")
    assert assert_same(made, ModelRequest(weights=str(tmp_path / "a.ckpt"))).model.activation == "clamp"


def test_a_folder_with_activation_aux_head_and_preprocessing(tmp_path: Path) -> None:
    made = smp.Unet(
        ENCODER,
        encoder_weights=None,
        classes=3,
        activation="softmax",
        in_channels=4,
        aux_params={"classes": 2, "dropout": 0.1},
    ).eval()
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["preprocess"] = {"mean": [0.1, 0.2, 0.3, 0.4], "std": [1, 1, 1, 1]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(ModelRequest(weights=str(tmp_path)))
    assert (loaded.model.in_channels, loaded.model.activation) == (4, "softmax")
    assert loaded.preprocess.mean == (0.1, 0.2, 0.3, 0.4)
    assert any("auxiliary classification head" in n and "dropped" in n for n in loaded.notes)
    kept = load_model(ModelRequest(weights=str(tmp_path), keep_aux=True))
    image = torch.rand(1, 4, 64, 64)
    with torch.no_grad(), without_warnings():
        masks, labels = made(image)
    assert torch.allclose(loaded.module(image), masks, atol=1e-6)
    assert torch.allclose(kept.module(image)[1], labels, atol=1e-6)


def test_the_config_of_the_encoder_weights_decides_the_preprocessing(tmp_path: Path) -> None:
    smp.Unet("efficientnet-b0", encoder_weights=None).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for weights, mean in (("imagenet", (0.485, 0.456, 0.406)), ("advprop", (0.5, 0.5, 0.5))):
        (tmp_path / "config.json").write_text(json.dumps({**config, "encoder_weights": weights}))
        assert load_model(ModelRequest(weights=str(tmp_path))).preprocess.mean == mean


def test_four_channels_without_normalization_are_not_guessed(tmp_path: Path) -> None:
    torch.save(smp.Unet(ENCODER, encoder_weights=None, in_channels=4).state_dict(), tmp_path / "four.pt")
    request = ModelRequest(arch="unet", encoder=ENCODER, in_channels=4, weights=str(tmp_path / "four.pt"))
    with pytest.raises(SpecError, match="normalization of 4 input channels; give --mean and --std with 4 values"):
        load_model(request)


def test_a_lightning_checkpoint_carries_its_architecture_and_normalization(
    model: Any, state: dict[str, Any], tmp_path: Path
) -> None:
    buffers = {"mean": torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1), "std": torch.full((1, 3, 1, 1), 0.2)}
    content = {
        "state_dict": {**prefixed(state, "model."), **buffers},
        "hyper_parameters": {"arch": "FPN", "encoder_name": ENCODER},
    }
    torch.save(content, tmp_path / "last.ckpt")
    loaded = assert_same(model, ModelRequest(weights=str(tmp_path / "last.ckpt"), model_args=ARGS))
    assert loaded.preprocess.mean == pytest.approx((0.4, 0.5, 0.6))
    assert "stripped 'model.' from the checkpoint's keys" in loaded.notes
    assert any("hyper_parameters: fpn, mobilenet_v2" in n for n in loaded.notes)
    assert any("normalization: buffers mean and std" in n for n in loaded.notes)


RATES = [2, 4, 6]


@pytest.mark.parametrize(
    "settings",
    [
        {
            "hyper_parameters": {
                "arch": "DeepLabV3Plus",
                "encoder_name": ENCODER,
                "decoder_atrous_rates": tuple(RATES),
                "lr": 1,
            }
        },
        {
            "hyper_parameters": {
                "lr": 1,
                "model": {"arch": "deeplabv3plus", "encoder_name": ENCODER, "decoder_atrous_rates": RATES},
            }
        },
        {
            "config": {
                "model_name": "deeplabv3+",
                "backbone": ENCODER,
                "model_kwargs": {"decoder_atrous_rates": RATES, "x": 1},
            }
        },
        {"args": argparse.Namespace(arch="DeepLabV3Plus", encoder=ENCODER, decoder_atrous_rates=RATES, classes=77)},
        {
            "model_args": {
                "arch": "deeplabv3plus",
                "encoder_name": ENCODER,
                "in_channels": 3,
                "decoder_atrous_rates": RATES,
            }
        },
    ],
    ids=["lightning", "lightning, nested", "config", "argparse", "create_model"],
)
def test_arguments_that_no_tensor_shows_are_read_beside_them(settings: dict[str, Any], tmp_path: Path) -> None:
    """Other rates are other results from the same tensors."""
    torch.manual_seed(1)
    made = smp.create_model(
        "deeplabv3plus", ENCODER, encoder_weights=None, classes=2, decoder_atrous_rates=RATES
    ).eval()
    torch.save({"state_dict": prefixed(dict(made.state_dict()), "model."), **settings}, tmp_path / "last.ckpt")
    loaded = assert_same(made, ModelRequest(weights=str(tmp_path / "last.ckpt")))
    assert loaded.model.model_args["decoder_atrous_rates"] == RATES
    assert any("decoder_atrous_rates [2, 4, 6]" in note for note in loaded.notes)
    # The user's own words come first.
    other = ModelRequest(weights=str(tmp_path / "last.ckpt"), model_args={"decoder_atrous_rates": [1, 2, 3]})
    assert load_model(other).model.model_args["decoder_atrous_rates"] == [1, 2, 3]


def test_arguments_of_older_smp_beside_the_tensors_are_translated(tmp_path: Path) -> None:
    with without_warnings():
        made = smp.Unet(ENCODER, encoder_weights=None, classes=2, decoder_use_norm=False).eval()
    kept = {"arch": "Unet", "encoder_name": ENCODER, "decoder_use_batchnorm": False, "activation": "sigmoid"}
    torch.save({"state_dict": made.state_dict(), "hyper_parameters": kept}, tmp_path / "last.ckpt")
    loaded = load_model(ModelRequest(weights=str(tmp_path / "last.ckpt")))
    assert loaded.model.model_args["decoder_use_norm"] is False
    assert loaded.model.activation == "sigmoid"


@pytest.mark.parametrize("arch", smp.MODEL_ARCHITECTURES_MAPPING)
def test_the_architecture_is_recognized_by_its_tensors(arch: str) -> None:
    encoder = "tu-vit_tiny_patch16_224" if arch == "dpt" else ENCODER
    with torch.device("meta"), without_warnings():
        keys = list(smp.create_model(arch, encoder, encoder_weights=None).state_dict())
    assert guess_arch(keys) == arch
    assert {name for name, _ in ARCH_MARKERS} == set(smp.MODEL_ARCHITECTURES_MAPPING)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": 7}, r"weights\.pt has 4 classes, 7 were asked for; give --classes 4"),
        ({"class_names": ("a", "b")}, r"has 4 classes, --class-names has 2; give one name for each class"),
        (
            {"encoder": "resnet18"},
            r"missing \(encoder\..*its encoder is that of mobilenet_v2: give --encoder mobilenet_v2",
        ),
        ({"encoder": "tu-mobilenetv3_small_050"}, r"its encoder is that of mobilenet_v2"),
        (
            {"arch": "unet", "model_args": {}},
            r"missing \(decoder\.blocks: \d+\).*its decoder is that of fpn: give --arch fpn",
        ),
        ({"in_channels": 4}, r"its tensors are those of another model: give --in-channels 3$"),
        (
            {"model_args": {"decoder_pyramid_channels": 32}},
            r"of another shape \(decoder\..*another model: give --model-arg decoder_pyramid_channels=16 --model-arg "
            r"decoder_segmentation_channels=32$",
        ),
        ({"model_args": {**ARGS, "aux_params": {"classes": 2}}, "keep_aux": True}, r"2 missing \(classification_head"),
    ],
)
def test_weights_that_do_not_fit_say_why(
    fields: dict[str, Any], message: str, state: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(asked(path, **fields))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


READ_OFF: dict[str, tuple[str, dict[str, Any], str]] = {
    "attention": ("unet", {"decoder_attention_type": "scse"}, 'decoder_attention_type "scse"'),
    "widths": ("unet", {"decoder_channels": [64, 32, 16, 16, 8]}, "decoder_channels [64,32,16,16,8]"),
    "depth": ("unet", {"encoder_depth": 4, "decoder_channels": [32, 16, 16, 8]}, "encoder_depth 4"),
    "no norm": ("manet", {"decoder_use_norm": False, "decoder_pab_channels": 32}, "decoder_use_norm false"),
    "unetplusplus": ("unetplusplus", {"encoder_depth": 3, "decoder_channels": [32, 16, 8]}, "encoder_depth 3"),
    "linknet": ("linknet", {"encoder_depth": 4}, "encoder_depth 4"),
    "fpn": ("fpn", {"encoder_depth": 4, "upsampling": 2, **ARGS}, "encoder_depth 4"),
    "merged": ("fpn", {"decoder_merge_policy": "cat", **ARGS}, 'decoder_merge_policy "cat"'),
    "pspnet": ("pspnet", {"encoder_depth": 4, "upsampling": 16, "psp_out_channels": 64}, "psp_out_channels 64"),
    "separable": ("deeplabv3", {"decoder_channels": 16, "decoder_aspp_separable": True}, "decoder_channels 16"),
}


@pytest.mark.parametrize("case", READ_OFF)
def test_depth_and_widths_are_read_off_the_tensors(case: str, tmp_path: Path) -> None:
    arch, built, told = READ_OFF[case]
    made = smp.create_model(arch, ENCODER, encoder_weights=None, classes=2, **built).eval()
    torch.save(made.state_dict(), tmp_path / "w.pt")
    loaded = assert_same(made, ModelRequest(arch=arch, encoder=ENCODER, weights=str(tmp_path / "w.pt")))
    assert loaded.model.model_args == built
    note = next(n for n in loaded.notes if n.startswith("by the shapes of the checkpoint's tensors: "))
    assert told in note


@pytest.mark.parametrize("said", ["64,32,16,16,8", [64, 32, 16, 16, 8], (64, 32, 16, 16, 8)])
def test_advice_on_the_decoder_loads_the_model_in_each_spelling(said: Any, tmp_path: Path) -> None:
    built = [64, 32, 16, 16, 8]
    made = smp.Unet(ENCODER, encoder_weights=None, decoder_channels=built).eval()
    torch.save(made.state_dict(), tmp_path / "u.pt")
    request = ModelRequest(arch="unet", encoder=ENCODER, weights=str(tmp_path / "u.pt"))
    with pytest.raises(CheckpointError, match=r"give --model-arg 'decoder_channels=\[64,32,16,16,8\]'$"):
        load_model(replace(request, model_args={"decoder_channels": [64, 32, 16, 16, 16]}))
    loaded = assert_same(made, replace(request, model_args={"decoder_channels": said}))
    assert list(loaded.model.model_args["decoder_channels"]) == built


def test_blocks_of_a_smaller_depth_need_no_depth_said(tmp_path: Path) -> None:
    made = smp.Unet(ENCODER, encoder_weights=None, encoder_depth=4, decoder_channels=[32, 16, 16, 8]).eval()
    torch.save(made.state_dict(), tmp_path / "u.pt")
    args = {"decoder_channels": [32, 16, 16, 8]}
    request = ModelRequest(arch="unet", encoder=ENCODER, weights=str(tmp_path / "u.pt"), model_args=args)
    assert assert_same(made, request).model.model_args == {**args, "encoder_depth": 4}


@pytest.mark.parametrize("encoder", [ENCODER, "tu-mobilenetv3_small_050"])
def test_an_encoder_that_nobody_named_is_recognized(encoder: str, tmp_path: Path) -> None:
    made = smp.FPN(encoder, encoder_weights=None, **ARGS).eval()
    torch.save(made.state_dict(), tmp_path / "w.pt")
    loaded = assert_same(made, ModelRequest(weights=str(tmp_path / "w.pt")))
    assert loaded.model.encoder == encoder
    assert any(f"checkpoint's tensors: encoder {encoder}" in n for n in loaded.notes)


def test_encoders_that_tensors_cannot_tell_apart_are_asked_for(tmp_path: Path) -> None:
    torch.save(smp.FPN("tu-mobilenetv3_small_100", encoder_weights=None).state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"tu-mobilenetv3_small_100 or .*which compute otherwise; give --encoder"):
        load_model(ModelRequest(weights=str(tmp_path / "w.pt")))


def test_a_timm_encoder_that_contradicts_is_told(tmp_path: Path) -> None:
    torch.save(smp.FPN("tu-resnet18", encoder_weights=None).state_dict(), tmp_path / "u.pt")
    with pytest.raises(CheckpointError, match="its encoder is that of tu-resnet18: give --encoder tu-resnet18"):
        load_model(ModelRequest(arch="fpn", encoder="tu-resnet34", weights=str(tmp_path / "u.pt")))


def test_a_replaced_first_convolution_decides_the_channels(tmp_path: Path) -> None:
    made = smp.Unet("resnet18", encoder_weights=None, classes=2)
    made.encoder.conv1 = torch.nn.Conv2d(8, 64, 7, 2, 3, bias=False)
    made.save_pretrained(tmp_path)  # config.json still says 3
    eight = {"mean": (0.0,) * 8, "std": (1.0,) * 8}
    for channels in (None, 8):
        loaded = load_model(ModelRequest(weights=str(tmp_path), in_channels=channels, **eight))
        assert loaded.model.in_channels == 8
    with pytest.raises(CheckpointError, match="give --in-channels 8$"):
        load_model(ModelRequest(weights=str(tmp_path), in_channels=3))


@pytest.mark.parametrize("encoder", ["timm-regnetx_002", "timm-resnest14d", "timm-gernet_s"])
def test_unused_stages_of_old_encoders_are_dropped(encoder: str, tmp_path: Path) -> None:
    """SMP 0.4 kept all stages whatever the depth, under these names; PSPNet's default depth is 3."""
    with without_warnings():
        made = smp.PSPNet(encoder, encoder_weights=None, psp_out_channels=16).eval()
        whole = smp.encoders.get_encoder(encoder, weights=None).state_dict()
    old = {f"encoder.{k}": v for k, v in whole.items()} | dict(made.state_dict())
    renamed = {k.replace("encoder.model.", "encoder.").replace(".stages_", ".stages."): v for k, v in old.items()}
    torch.save(renamed, tmp_path / "w.pt")
    loaded = assert_same(made, ModelRequest(arch="pspnet", encoder=encoder, weights=str(tmp_path / "w.pt")))
    assert any("of deeper encoder stages, which the model does not use" in n for n in loaded.notes)


HARMLESS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "thop's counters": lambda s: {**s, "total_ops": torch.zeros(1), "encoder.features.0.total_params": torch.zeros(1)},
    "(activation checkpointing)": lambda s: {
        k.replace("features.1.", "features.1._checkpoint_wrapped_module."): v for k, v in s.items()
    },
    "(DataParallel of a part)": lambda s: {k.replace("encoder.", "encoder.module."): v for k, v in s.items()},
    "dropped 5 tensors: fake-quantizers of": lambda s: {
        **s,
        **dict.fromkeys(
            (
                "decoder.p5.activation_post_process.eps",
                "decoder.p5.weight_fake_quant.scale",
                "decoder.p5._input_quantizer._amax",
                "decoder.p5.weight_quantizer._amax",
                "__nncf_hooks.post_hooks.conv/0.0.input_low",
            ),
            torch.zeros(1),
        ),
    },
}


@pytest.mark.parametrize("what", HARMLESS)
def test_harmless_leftovers_of_training_tools_are_dropped(
    what: str, model: Any, state: dict[str, Any], tmp_path: Path
) -> None:
    torch.save(HARMLESS[what](state), tmp_path / "w.pt")
    assert any(what in n for n in assert_same(model, asked(tmp_path / "w.pt")).notes)


def reparametrized(apply: Callable[[Any], Any]) -> dict[str, Any]:
    made = smp.FPN(ENCODER, encoder_weights=None, classes=4, **ARGS)
    for part in list(made.modules()):
        if isinstance(part, torch.nn.Conv2d):
            apply(part)
    return dict(made.state_dict())


IN_PARTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "pruned": (
        lambda: reparametrized(lambda m: prune.identity(m, "weight")),
        r"holds pruning masks .*call torch\.nn\.utils\.prune\.remove",
    ),
    "weight norm": (
        lambda: reparametrized(torch.nn.utils.parametrizations.weight_norm),
        r"holds parametrized weights .*remove_parametrizations",
    ),
    "LoRA": (
        lambda: {"base_model.model.segmentation_head.0.base_layer.weight": torch.ones(1), "x.lora_A.w": torch.ones(1)},
        r"holds LoRA adapters .*merge_and_unload",
    ),
}


@pytest.mark.parametrize("case", IN_PARTS)
def test_weights_kept_in_parts_are_named_with_what_joins_them(case: str, tmp_path: Path) -> None:
    make, message = IN_PARTS[case]
    torch.save(make(), tmp_path / "w.pt")
    refuse(tmp_path / "w.pt", message)


def test_what_is_missing_or_added_is_named(model: Any, state: dict[str, Any], tmp_path: Path) -> None:
    torch.save(dict(model.named_parameters()), tmp_path / "w.pt")
    refuse(tmp_path / "w.pt", r"without BatchNorm's running_mean and running_var: save model\.state_dict\(\)")
    torch.save({**state, "encoder.fc.weight": torch.ones(1)}, tmp_path / "w.pt")
    refuse(
        tmp_path / "w.pt", r"are all there: if what training added \(encoder\.fc\.weight, \.\.\.\) does not take part"
    )
    # A head of the user's own: without its tensors the rest would fit another network.
    weight = "segmentation_head.0.weight"
    for other in ({weight: state[weight].repeat(1, 1, 3, 3)}, {"segmentation_head.3.weight": torch.ones(2, 4, 1, 1)}):
        torch.save({**state, **other}, tmp_path / "w.pt")
        refuse(tmp_path / "w.pt", r"its segmentation head is not SMP's: load the weights into your own module and give")


def test_the_image_size_of_a_position_embedding_is_told(tmp_path: Path) -> None:
    small = {"decoder_intermediate_channels": [16, 16, 16, 16], "decoder_fusion_channels": 16}
    encoder = "tu-vit_tiny_patch16_224"
    with without_warnings():
        made = smp.DPT(encoder, encoder_weights=None, classes=2, img_size=128, **small).eval()
    torch.save(made.state_dict(), tmp_path / "w.pt")
    request = ModelRequest(arch="dpt", encoder=encoder, weights=str(tmp_path / "w.pt"), model_args=small)
    with pytest.raises(CheckpointError, match=r"images of 128x128: give --model-arg img_size=128$"):
        load_model(request)
    loaded = load_model(replace(request, model_args={**small, "img_size": 128}))
    image = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(loaded.module(image), made(image))


def test_keys_of_older_smp_versions_still_load(tmp_path: Path) -> None:
    made = smp.DeepLabV3(ENCODER, encoder_weights=None, classes=2).eval()
    new_to_old = {"decoder.aspp.": "decoder.0.", "decoder.conv.": "decoder.1.", "decoder.bn.": "decoder.2."}
    old = {}
    for key, value in made.state_dict().items():
        for new, before in new_to_old.items():
            key = key.replace(new, before) if key.startswith(new) else key
        old[key] = value
    torch.save(old, tmp_path / "old.pt")
    loaded = load_model(ModelRequest(encoder=ENCODER, weights=str(tmp_path / "old.pt")))
    assert loaded.model.arch == "deeplabv3"
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.module(image), made(image))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, state: dict[str, Any], tmp_path: Path) -> None:
    bad = {k: v.clone() for k, v in state.items()}
    bad["decoder.p5.weight"][0, 0] = value
    bad["encoder.features.1.conv.0.1.running_var"][3] = value
    torch.save(bad, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"NaN or Inf in 2 tensors \(decoder\.p5\.weight, encoder\.features\.1\."):
        load_model(asked(tmp_path / "bad.pt"))


# Hostile and damaged files.


class Payload:
    """A pickle that creates a file when it is opened with full powers."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def refuse(path: Path, message: str) -> None:
    """Reading must fail with one readable line."""
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(asked(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle", "inside hyper_parameters"])
def test_code_in_a_pickle_is_not_run(form: str, state: dict[str, Any], tmp_path: Path) -> None:
    marker, path = tmp_path / "was here", tmp_path / "evil.pt"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(Payload(marker)))
    elif form == "inside hyper_parameters":
        torch.save({"state_dict": state, "hyper_parameters": {"x": Payload(marker)}}, path)
    else:
        torch.save({"w": Payload(marker)}, path, _use_new_zipfile_serialization=form == "zip")
    what = "a pickle that torch.save did not write" if form == "bare pickle" else r"would run code to open \(.*system\)"
    refuse(path, rf"{what}, which is refused; .*torch\.save\(model\.state_dict\(\)")
    assert not marker.exists()


def test_a_whole_pickled_model_is_refused(model: Any, tmp_path: Path) -> None:
    torch.save(model, tmp_path / "whole.pt")
    refuse(tmp_path / "whole.pt", r"holds a pickled module \(segmentation_models_pytorch\.decoders\.fpn\.model\.FPN\)")


def test_a_loss_object_is_named(state: dict[str, Any], tmp_path: Path) -> None:
    for loss in (smp.losses.DiceLoss("multiclass"), torch.nn.CrossEntropyLoss()):
        torch.save({"state_dict": state, "hyper_parameters": {"loss": loss}}, tmp_path / "w.ckpt")
        refuse(tmp_path / "w.ckpt", r"holds a loss object \(.*Loss\) beside its weights, which is refused")


def test_an_array_of_objects_is_named(state: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"state_dict": state, "names": np.array(["road", None], object)}, tmp_path / "w.pt")
    refuse(tmp_path / "w.pt", "holds an array of Python objects beside its weights, which is refused")


def test_a_dictionary_that_holds_itself_ends(state: dict[str, Any], model: Any, tmp_path: Path) -> None:
    content: dict[str, Any] = {"best": state}
    content.update({f"self{number}": content for number in range(1000)})
    torch.save(content, tmp_path / "w.pt")
    assert_same(model, asked(tmp_path / "w.pt"))


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    with without_warnings():
        torch.jit.save(torch.jit.trace(torch.nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 8, 8)), str(path))
    refuse(path, "is a TorchScript archive")


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\x80\x02}.")
        archive.writestr("bomb/data/0", bytes(50_000_000))
    assert bomb.stat().st_size < 100_000
    refuse(bomb, "is a compressed archive, which torch.save never writes")


def test_tensors_without_bytes_behind_them_are_refused(tmp_path: Path) -> None:
    torch.save({"segmentation_head.0.weight": torch.zeros(1).expand(10**12)}, tmp_path / "stride0.pt")
    refuse(tmp_path / "stride0.pt", "claims 4000000000000 bytes of tensors in")
    torch.save({"segmentation_head.0.weight": torch.empty(10**12, device="meta")}, tmp_path / "meta.pt")
    refuse(tmp_path / "meta.pt", "is no plain tensor")
    torch.save({"segmentation_head.0.weight": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
    refuse(tmp_path / "sparse.pt", "is no plain tensor")


def test_integer_weights_are_refused(state: dict[str, Any], tmp_path: Path) -> None:
    torch.save({**state, "decoder.p5.weight": (state["decoder.p5.weight"] * 127).char()}, tmp_path / "int.pt")
    refuse(tmp_path / "int.pt", r"decoder\.p5\.weight hold integers, fpn .* has floats: quantized")


def safetensors_file(header: bytes, data: bytes = b"", claimed: int | None = None) -> bytes:
    """The format: length of the header (u64, little-endian), the JSON header, the data."""
    return struct.pack("<Q", len(header) if claimed is None else claimed) + header + data


SAFETENSORS: dict[str, bytes] = {
    "a header of a terabyte": safetensors_file(b"{}", claimed=1 << 40),
    "a header of 90 MB that is not there": safetensors_file(b"{", claimed=90_000_000),
    "no JSON": safetensors_file(b"{xxxxxxx"),
    "offsets outside the file": safetensors_file(b'{"a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}'),
    "shape and offsets disagree": safetensors_file(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}', b"1234"),
    "an unknown type": safetensors_file(b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}', b"1234"),
    "a shape that overflows": safetensors_file(
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,4]}}', b"1234"
    ),
    "nothing but a length": struct.pack("<Q", 2),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_hostile_safetensors(case: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(SAFETENSORS[case])
    refuse(path, "is truncated, damaged or no safetensors file")


def test_safetensors_without_tensors(tmp_path: Path) -> None:
    (tmp_path / "none.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    refuse(tmp_path / "none.safetensors", "holds no tensors")


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty; copy or download it again"),
    "text": (b"hello, this is not a checkpoint\n" * 9, r"is no PyTorch checkpoint \(starts with b'hello, t'\)"),
    "a web page": (b"<!DOCTYPE html><html></html>", "is no PyTorch checkpoint"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "run: git lfs pull"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "is no PyTorch checkpoint"),
    "another zip": (b"PK\x05\x06" + bytes(18), "is a zip archive, but no PyTorch checkpoint"),
    "a cut zip": (b"PK\x03\x04" + bytes(200), "is truncated or damaged"),
    "a cut pickle": (b"\x80\x02}q\x00X\x05", "is truncated or damaged"),
    "a list": (pickle.dumps([1, 2, 3], protocol=2), "is truncated or damaged|holds a list"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_of_another_kind(case: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(FILES[case][0])
    refuse(path, FILES[case][1])


def test_checkpoints_without_a_model(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "a.pt")
    refuse(tmp_path / "a.pt", r"holds no state dict \(it has 'epoch', 'loss'\)")
    torch.save([torch.ones(1)], tmp_path / "b.pt")
    refuse(tmp_path / "b.pt", "holds a list, not a state dict")
    torch.save({"layer1.0.conv1.weight": torch.ones(1), "fc.weight": torch.ones(1)}, tmp_path / "c.pt")
    refuse(tmp_path / "c.pt", "no SMP segmentation model: it looks like a classifier")
    torch.save({"encoder.conv1.weight": torch.ones(1)}, tmp_path / "d.pt")
    refuse(tmp_path / "d.pt", "it looks like an encoder only")


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    refuse(tmp_path / "pipe.pt", "no regular file")  # and does not wait for a writer
    refuse(tmp_path / "imagnet", "no such file or folder: .*imagenet or random")
    refuse(tmp_path, r"is not a save_pretrained folder \(no config.json\)")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated_files_never_load(form: str, state: dict[str, Any], tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut.pt"
    if form == "safetensors":
        save_file(state, whole)
    else:
        torch.save(state, whole, _use_new_zipfile_serialization=form == "zip")
    content = whole.read_bytes()
    for length in (1, 7, 9, 100, 1000, len(content) // 2, len(content) - 100, len(content) - 1):
        cut.write_bytes(content[:length])
        refuse(cut, "truncated|damaged|is no PyTorch")
