"""A folder to upload to the Hugging Face hub: the engine folder, and a model card made of what the manifest knows."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from edgeseg.backends.portable import open_graph
from edgeseg.console import markdown_text
from edgeseg.errors import SpecError
from edgeseg.evaluate.summary import noise_lines, share
from edgeseg.evaluate.tables import counted
from edgeseg.handover.contents import Content, input_words, labels, values_words
from edgeseg.store.engine import Engine
from edgeseg.store.manifest import MANIFEST_NAME, Manifest, Verification

PICTURE_NAME = "picture.png"
_MOST_LABELS = 200


def contents(engine: Engine, licence: str | None, picture: Path | None) -> dict[str, Content]:
    """The files of the repository, by path: a portable graph, never a plan, which is native code that nobody should download.

    Raises:
        SpecError: no licence was said, or one that is no word of the hub's.
    """
    manifest = engine.manifest
    if licence is None:
        known = None if manifest.origin is None else manifest.origin.licence_words
        hint = f"; the card beside the weights {known}" if known else ""
        raise SpecError(
            f"the hub asks for the licence of the weights; give --license, such as apache-2.0 or other{hint}"
        )
    if re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,40}", licence) is None:
        raise SpecError(
            f"--license is {licence[:60]!r}; give the hub's word for it in small letters, such as apache-2.0"
        )
    if manifest.target.startswith("tensorrt"):
        # What was measured was the plan.
        manifest = dataclasses.replace(manifest, engine=None, extra_files=(), verification=None)
    refs = (manifest.graph, manifest.engine, manifest.calibration, *manifest.extra_files)
    files: dict[str, Content] = {ref.name: engine.folder / ref.name for ref in refs if ref is not None}
    files[MANIFEST_NAME] = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    if picture is not None:
        files[PICTURE_NAME] = _picture(engine, picture)
    files["README.md"] = _card(manifest, licence, has_picture=picture is not None).encode()
    return files


def _picture(engine: Engine, path: Path) -> bytes:
    """The image and its mask side by side, as PNG."""
    import numpy as np
    from PIL import Image

    from edgeseg.images.decoding import read_image
    from edgeseg.runtime.overlay import colorize, shown_levels
    from edgeseg.runtime.segmenter import Segmenter, load

    with ExitStack() as opened:
        if engine.manifest.engine is None:
            # The graph is what is uploaded, wherever its engine will be built.
            segmenter = Segmenter(opened.enter_context(open_graph(engine)), engine.manifest.spec)
        else:
            segmenter = opened.enter_context(load(engine.folder))
        wanted = segmenter.spec.input
        image = read_image(path, wanted.channels, wanted.dtype)
        colours = colorize(np.asarray(segmenter(image)))
    stream = io.BytesIO()
    Image.fromarray(np.concatenate([shown_levels(image), colours], axis=1)).save(stream, "PNG")
    return stream.getvalue()


def _card(manifest: Manifest, licence: str, *, has_picture: bool) -> str:
    spec = manifest.spec
    origin = manifest.origin
    head: dict[str, Any] = {
        "license": licence,
        "library_name": "edgeseg",
        "pipeline_tag": "image-segmentation",
        "tags": ["edgeseg", "semantic-segmentation", "onnx", manifest.precision.requested],
    }
    if origin is not None and origin.repository is not None:
        head["base_model"] = origin.repository
    # JSON is YAML: no text of a manifest can end the metadata early.
    metadata = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    names = labels(spec)
    listed = ", ".join(f"{index} {markdown_text(name)}" for index, name in enumerate(names[:_MOST_LABELS]))
    more = f" and {len(names) - _MOST_LABELS} more" if len(names) > _MOST_LABELS else ""
    picture = f"![An image and its mask]({PICTURE_NAME})\n\n" if has_picture else ""
    source = f" of {markdown_text(origin.hub_id)}" if origin is not None and origin.hub_id is not None else ""
    install = {"openvino": "openvino", "tensorrt": "jetson", "tensorrt-rtx": "tensorrt-rtx"}.get(
        manifest.target, "onnxruntime"
    )
    compiled = "" if manifest.engine is not None else "edgeseg compile model          # this device's engine\n    "
    return f"""---
{metadata}
---
# {markdown_text(manifest.name)}

{picture}An edgeseg engine folder{source}: {markdown_text(spec.in_words)}; {manifest.precision.requested} for {manifest.target}.

## Run

    pip install "edgeseg[{install}]"
    hf download USER/MODEL --local-dir model
    {compiled}edgeseg run model photos/ --output masks --overlay

- `image`: {input_words(spec)}. Images of another size are fitted ({spec.input.fit}); normalization is inside.
- {values_words(spec)}: {listed}{more}.

## Verification

{_verification(manifest.verification)}
"""


def _verification(verification: Verification | None) -> str:
    if verification is None:
        return "Not verified: no images were given when the engine was built, or it is compiled on the device."
    v = verification
    before, after = v.pytorch_accuracy, v.engine_accuracy
    rows = [
        ("mIoU", share(before.miou), share(after.miou)),
        ("Dice", share(before.dice), share(after.dice)),
        ("pixel accuracy", share(before.pixel_accuracy), share(after.pixel_accuracy)),
        (f"agreement with {markdown_text(v.reference)}", "-", share(v.agreement)),
        ("median ms", *(("-" if x is None else f"{x.median_ms:.1f}") for x in (v.pytorch_latency, v.engine_latency))),
        ("size", *(f"{size / 1e6:.1f} MB" for size in (v.pytorch_size_bytes, v.engine_size_bytes))),
    ]
    table = "\n".join(f"| {name} | {one} | {two} |" for name, one, two in rows)
    words = f"On {counted(v.images, 'image')}: {markdown_text(v.data)}. "
    words += "Times are of the machine that built it; `-` was not measured."
    if noise_lines(v):
        words += " They are noisy: measure with `edgeseg bench`."
    return f"| | {markdown_text(v.reference)} | engine |\n|---|---:|---:|\n{table}\n\n{words}"
