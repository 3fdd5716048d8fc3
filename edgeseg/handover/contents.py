"""What a handed-over folder is to hold, before it is written."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from edgeseg.spec import PipelineSpec

Content: TypeAlias = "bytes | Path"
"""Of one file: its bytes, or the file to copy."""


def labels(spec: PipelineSpec) -> list[str]:
    """A name per value of the mask, or per plane; numbers where nobody named the classes."""
    names = list(spec.model.class_names) or [f"class {index}" for index in range(spec.model.classes)]
    return ["background", *names] if spec.model.task == "binary" and spec.output.kind == "mask" else names


def values_words(spec: PipelineSpec) -> str:
    """What numbers stand for what label, as a clause."""
    if spec.output.kind != "mask" or spec.model.task == "multilabel":
        return f"Planes of `{spec.output.kind}`"
    return "Values of `mask`"


def input_words(spec: PipelineSpec) -> str:
    """What goes in, for a README."""
    size = spec.input
    colours = {1: "grey", 3: "RGB"}.get(size.channels, f"{size.channels} channels")
    sides = f"multiples of {size.stride}" if size.dynamic_size else f"{size.height}x{size.width}"
    return (
        f"uint8 `(N, height, width, {size.channels})`, {colours}, {sides}, N {size.batch}: the image as it was decoded"
    )
