"""Hostile config.json and checkpoints of a small Unet: each is refused in one line, damaged ones raise our errors only."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch")
from fuzz_readers import Subject, checkpoints, fuzz

from edgeseg.convert.checkpoint import read_checkpoint
from edgeseg.errors import EdgesegError

pytestmark = pytest.mark.integration

CONFIGS: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "empty": (b"", "is damaged or not JSON"),
    "text": (b"not JSON", "is damaged or not JSON"),
    "bytes": (b"\xff\xfe\0", "is damaged or not JSON"),
    "page": (b"<!DOCTYPE html>", "is damaged or not JSON"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "is damaged or not JSON"),
    "a list": (b"[]", "holds a list, not the arguments of a model"),
    "a number": (b"3", "holds a int, not the arguments of a model"),
    "huge": (b'{"a":"' + b"x" * (2 << 20) + b'"}', "has 2097160 bytes"),
    "no class": (b'{"encoder_name": "resnet18"}', "names no SMP model"),
    "digits": ({"classes": 10**400}, "classes is a number of about 40. digits; give a whole number"),
    "classes": ({"classes": 2**62}, "classes is 4611686018427387904; give a whole number from 1 to 65535"),
    "classes of words": ({"classes": "5"}, "classes"),
    "no classes": ({"classes": 0}, "classes is 0; give a whole number from 1"),
    "other classes": ({"classes": 7}, "has 5 classes, 7 were asked for"),
    "channels": ({"in_channels": 10**6}, "in_channels is 1000000; "),
    "encoder": ({"encoder_name": "resnet1800"}, "unknown encoder 'resnet1800'"),
    "encoder of a number": ({"encoder_name": 18}, "encoder"),
    "encoder with a path": ({"encoder_name": "../../etc/passwd"}, "unknown encoder"),
    "class": ({"_model_class": "MyNet"}, "of the class 'MyNet', which is not SMP's"),
    "wide decoder": (
        {"encoder_depth": 5, "decoder_channels": [9000] * 5},
        r"the model described has \d{4} million values, its checkpoint \d\.\d million",
    ),
    "large encoder": (
        b'{"_model_class": "DPT", "encoder_name": "tu-vit_giant_patch14_224"}',
        r"the model described has \d{4} million values",
    ),
    "large number": (
        b'{"_model_class": "FPN", "encoder_name": "mobilenet_v2", "upsampling": 4000}',
        "upsampling holds 4000; numbers up to 64",
    ),
    "a local file": ({"checkpoint_path": "/etc/passwd"}, "has no argument 'checkpoint_path'"),
    "an overlay": ({"pretrained_cfg_overlay": {"file": "/etc/passwd"}}, "has no argument 'pretrained_cfg_overlay'"),
    "layers": ({"layers": [1_000_000, 2, 2, 2]}, "has no argument 'layers'"),
    "long text": ({"decoder_interpolation": "n" * 10_000}, "is a text of 10000 characters; at most"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    return checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("name", CONFIGS)
def test_each_config_is_refused_in_one_line_that_says_why(whole: dict[str, Subject], name: str) -> None:
    subject, (content, words) = whole["hub/config.json"], CONFIGS[name]
    good = subject.path.read_bytes()
    if isinstance(content, dict):
        content = json.dumps(json.loads(good) | content).encode()
    try:
        subject.path.write_bytes(content)
        with pytest.raises(EdgesegError, match=words) as caught:
            subject.read(subject.path)
    finally:
        subject.path.write_bytes(good)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize(
    "kind",
    ["checkpoint/a.ckpt", "checkpoint/old.pt", "checkpoint/a.safetensors", "hub/config.json", "network/plain.onnx"],
)
def test_pipes_and_files_of_gigabytes_are_not_read(whole: dict[str, Subject], kind: str) -> None:
    subject = whole[kind]
    good = subject.path.read_bytes()
    try:
        subject.path.unlink()
        os.mkfifo(subject.path)
        with pytest.raises(EdgesegError, match=r"no regular file|no config\.json"):
            subject.read(subject.path)
        subject.path.unlink()
        subject.path.touch()
        os.truncate(subject.path, 6 << 30)  # sparse: no disk is filled
        with pytest.raises(EdgesegError):
            subject.read(subject.path)
    finally:
        subject.path.unlink()
        subject.path.write_bytes(good)


def test_damaged_checkpoints_raise_nothing_but_our_own(whole: dict[str, Subject]) -> None:
    """A short run of ``tests/fuzz_readers.py``, which loads whole models."""
    for name, subject in whole.items():
        if name.startswith("checkpoint/"):
            assert fuzz(replace(subject, read=read_checkpoint), random.Random(name), 25) == []
        else:
            assert fuzz(subject, random.Random(name), 3) == []
