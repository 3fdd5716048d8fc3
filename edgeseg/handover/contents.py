"""What a handed-over folder is to hold, before it is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from edgeseg.backends.portable import awaits_calibration
from edgeseg.console import markdown_text
from edgeseg.errors import SpecError
from edgeseg.spec import PipelineSpec
from edgeseg.store.engine import Engine
from edgeseg.store.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    import onnx

Content: TypeAlias = "bytes | Path"
"""Of one file: its bytes, or the file to copy."""


def labels(spec: PipelineSpec) -> list[str]:
    """A name per value of the mask, or per plane; numbers where nobody named the classes."""
    names = list(spec.model.names)
    return ["background", *names] if spec.model.task == "binary" and spec.output.kind == "mask" else names


def values_words(spec: PipelineSpec) -> str:
    """What numbers stand for what label, as a clause."""
    if spec.output.kind != "mask" or spec.model.task == "multilabel":
        return f"Planes of `{spec.output.kind}`"
    return "Values of `mask`"


def input_words(spec: PipelineSpec, dtype: str | None = None) -> str:
    """What goes in, for a README; ``dtype`` where that of the image is another."""
    size = spec.input
    colours = {1: "grey", 3: "RGB"}.get(size.channels, f"{size.channels} channels")
    sides = f"multiples of {size.stride}" if size.dynamic_size else f"{size.height}x{size.width}"
    shape = f"{dtype or size.dtype} `(N, height, width, {size.channels})`"
    return f"{shape}, {colours}, {sides}, N {size.batch}: the image as it was decoded"


def require(
    engine: Engine,
    host: str,
    *,
    target: str,
    fit: str,
    batch: bool,
    channels: tuple[int, ...] = (),
    others: Sequence[tuple[bool, str]] = (),
) -> None:
    """Refuse an engine that a host of single masks cannot run, saying what to build instead.

    Args:
        engine: the engine.
        host: its name, for the message.
        target: the target whose graphs it runs.
        fit: how it brings images to the engine's size.
        batch: it takes a batch range that begins with 1; else it takes single images only.
        channels: how many it can hand over; empty for any number.
        others: further reasons: whether each is one here, and in words.

    Raises:
        SpecError: this engine is of another kind; names all reasons, because each takes another build.
    """
    spec, about = engine.manifest.spec, engine.manifest
    size, kind = spec.input, spec.output.kind
    wanted = "--batch 1 or 1:N:M" if batch else "--batch 1"
    refusals = (
        (
            size.dtype != "uint8",
            f"hands over pixels of 8 bits, the engine takes {size.dtype}; give --to triton, or build with --input-dtype uint8",
        ),
        (about.target != target, f"runs graphs of --target {target}, this is {about.target}'s; build for that"),
        (
            spec.model.task == "multilabel",
            "knows one class per pixel, this is multilabel; give --task multiclass or binary",
        ),
        (kind != "mask", f"is given what decides the mask, this engine gives {kind}; build with --output-kind mask"),
        (spec.model.classes > 256, f"has masks of 8 bits, this has {spec.model.classes} classes; at most 256"),
        (size.dynamic_size, f"takes one size; build without --dynamic-size, such as --size {size.height}x{size.width}"),
        (
            size.batch.minimum > 1 or (size.batch.is_dynamic and not batch),
            f"sends one image, the engine takes {size.batch}; build with {wanted}",
        ),
        (
            bool(channels) and size.channels not in channels,
            f"has images of {' or '.join(map(str, channels))} channels, the engine takes {size.channels}; give --to triton",
        ),
        (
            size.fit != fit,
            f"brings images to size by {fit}, the engine was built for {size.fit}; build with --fit {fit}",
        ),
        (
            awaits_calibration(about.precision, about.options),
            "needs the Q/DQ graph of an int8 engine; build without --backend-option implicit_calibration=true",
        ),
        *others,
    )
    if reasons := [words for refused, words in refusals if refused]:
        raise SpecError(f"{host} {'; it '.join(reasons)}")


def graph_bytes(model: onnx.ModelProto) -> bytes:
    """An ONNX file, the same for the same graph."""
    return bytes(model.SerializeToString(deterministic=True))


def label_lines(spec: PipelineSpec) -> bytes:
    """``labels.txt``: a name per line, none with the line ends, semicolons or lengths at which hosts divide."""
    return "".join(f"{' '.join(name.replace(';', ',').split())[:100]}\n" for name in labels(spec)).encode()


def readme(engine: Engine, host: str, start: str, notes: Sequence[str]) -> bytes:
    """README of a folder for ``host``: what it is, how it is started (Markdown), what to know."""
    spec = engine.manifest.spec
    numbered = ", ".join(f"{index} {markdown_text(name)}" for index, name in enumerate(labels(spec)))
    size = spec.input
    if size.fit == "resize" and size.interpolation != "linear":
        notes = (
            *notes,
            f"edgeseg resizes for this model by {size.interpolation}; frames of {size.height}x{size.width} give its masks.",
        )
    listed = "\n".join(f"- {note}" for note in notes)
    return f"""# {markdown_text(engine.manifest.name)} for {host}

{markdown_text(spec.in_words)}; {engine.manifest.precision.requested}. The graph is the
engine's own between the image and its scores; input and output are what {host} hands over and expects. Normalization
is inside.

{start}

{listed}
- Classes: {numbered}.

Written and checked in ONNX Runtime, not started: with what {host} does around the graph re-implemented, it gives the
engine's masks. `handover.json` has the SHA-256 of every file, `{MANIFEST_NAME}` is the engine's own record.
""".encode()


def threshold_words(engine: Engine) -> str:
    """How a pixel's class is decided, as a sentence."""
    spec = engine.manifest.spec
    if spec.model.task == "multiclass":
        return "The most probable class wins."
    return f"The engine's threshold of {spec.output.threshold:g} is inside the graph: the higher of two planes wins."
