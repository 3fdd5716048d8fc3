"""The shipped demo models, as requests and checkpoints like any other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edgeseg.convert.checkpoint import Checkpoint, read_checkpoint
from edgeseg.demo import demo_files, demo_models
from edgeseg.errors import SpecError
from edgeseg.spec import ChannelOrder, ModelRequest, Preprocess, Task
from edgeseg.store.documents import read_json


@dataclass(frozen=True)
class DemoPreprocess:
    """``preprocess`` of a demo model's JSON: for RGB images divided by 255."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    channel_order: ChannelOrder = "rgb"


@dataclass(frozen=True)
class DemoModel:
    """A demo model's JSON description; ``size`` is height and width in pixels."""

    arch: str
    encoder: str
    classes: int
    class_names: tuple[str, ...]
    task: Task
    preprocess: DemoPreprocess
    size: tuple[int, int]
    model_args: dict[str, Any] = field(default_factory=dict)

    @property
    def normalization(self) -> Preprocess:
        """The demo model's preprocessing."""
        values = self.preprocess
        return Preprocess(values.mean, values.std, 1.0 / 255.0, values.channel_order, "the demo model's description")


def read_demo(request: ModelRequest, arch: str) -> tuple[DemoModel, Checkpoint]:
    """Return the demo model of an architecture, checked not to contradict the request.

    Raises:
        SpecError: there is none for ``arch``, or the user described another model.
        ArtifactError, CheckpointError: the installation's demo files are damaged.
    """
    instead = "give --weights PATH (a checkpoint), imagenet (encoder only) or random"
    if arch not in demo_models():
        have = ", ".join(demo_models()) or "none in this installation"
        raise SpecError(f"no weights given, and {arch} has no demo model (there are: {have}); {instead}")
    description, weights = demo_files(arch)
    demo = read_json(description, DemoModel, "demo model")
    conflicts = ", ".join(_conflicts(request, demo)[:3])
    if conflicts:
        raise SpecError(f"no weights given, and the demo {arch} is another model ({conflicts}); {instead}")
    return demo, read_checkpoint(weights)


def _conflicts(request: ModelRequest, demo: DemoModel) -> list[str]:
    """What the user asked for that the demo model is not, in words."""
    pairs: list[tuple[str, object, object]] = [
        ("encoder", request.encoder.lower() if request.encoder else None, demo.encoder.lower()),
        ("classes", request.classes, demo.classes),
        ("class names", request.class_names or None, demo.class_names),
        ("task", request.task, demo.task),
        ("input dtype", request.input_dtype, "uint8"),
        ("in_channels", request.in_channels, len(demo.preprocess.mean)),
        ("clip", request.clip, demo.normalization.clip),
        ("mean", request.mean, demo.preprocess.mean),
        ("std", request.std, demo.preprocess.std),
        ("scale", request.scale, demo.normalization.scale),
        ("channel order", request.channel_order, demo.preprocess.channel_order),
        *((name, value, demo.model_args.get(name)) for name, value in request.model_args.items()),
    ]
    conflicts = [f"{what} {mine}, not {asked}" for what, asked, mine in pairs if asked is not None and asked != mine]
    if request.activation not in (None, "none", "identity"):
        conflicts.append(f"no activation, not {request.activation}")
    if request.keep_aux:
        conflicts.append("no auxiliary head")
    return conflicts
