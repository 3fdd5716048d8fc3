"""The command kept in a manifest: typing it asks for the same build."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeseg.cli import build as verb
from edgeseg.pipeline.request import BuildRequest
from edgeseg.spec import BatchRange

PLAIN = BuildRequest("fpn")
FULL = BuildRequest(
    arch="unet",
    encoder="tu-mobilenetv4_conv_small",
    weights="my models/unet 1.safetensors",
    classes=3,
    class_names=("sky", "side walk", "it's"),
    task="multilabel",
    in_channels=1,
    activation="sigmoid",
    model_args={"decoder_channels": (64, 32), "decoder_dropout": 0.0, "norm": "true", "name": "a b", "on": True},
    keep_aux=True,
    mean=(-0.5,),
    std=(0.1 + 0.2,),
    channel_order="bgr",
    precision="fp16",
    size=(352, 480),
    batch=BatchRange(1, 4, 8),
    dynamic_size=True,
    fit="letterbox",
    output_kind="probabilities",
    confidence=True,
    threshold=0.25,
    calibration="photos/*.jpg",
    calibration_method="entropy",
    calibration_limit=32,
    validation=Path("val"),
    ignore_index=-1,
    target="tensorrt-rtx",
    scheme="tensorrt",
    backend_options={"sm": "86,89", "tf32": False, "workspace_mb": 512},
    max_drop=0.01,
    min_agreement=0.99,
    min_int8_share=0.5,
    folder=Path("engines/one"),
)


def asked(text: str, monkeypatch: pytest.MonkeyPatch) -> BuildRequest:
    """What the command line asks for when it is typed."""
    requests: list[BuildRequest] = []
    monkeypatch.setattr(verb, "_build_and_print", lambda request, as_json: requests.append(request))
    words = shlex.split(text)
    assert words[:2] == ["edgeseg", "build"]
    verb.command.main(words[2:], standalone_mode=False)
    return requests[0]


def test_only_what_was_said_is_repeated() -> None:
    assert PLAIN.command == "edgeseg build --arch fpn --precision int8"


@pytest.mark.parametrize("request_", [PLAIN, FULL, replace(PLAIN, batch=BatchRange(4, 4, 4), ignore_index=255)])
def test_the_command_asks_for_the_same_build(request_: BuildRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    text = request_.command
    assert text is not None
    # JSON has no tuples.
    as_typed = {k: list(v) if isinstance(v, tuple) else v for k, v in request_.model_args.items()}
    assert asked(text, monkeypatch) == replace(request_, model_args=as_typed)


@pytest.mark.parametrize(
    "request_",
    [
        replace(PLAIN, calibration=[np.zeros((8, 8, 3), np.uint8)]),
        replace(PLAIN, class_names=("car, parked", "sky")),
    ],
)
def test_what_no_command_line_can_say_has_no_command(request_: BuildRequest) -> None:
    assert request_.command is None
