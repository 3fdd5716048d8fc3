"""A model for jetson-inference's ``segnet``.

Written against its source: ``segNet.cpp`` (``cudaTensorNormMeanRGB`` with ImageNet's mean and deviation, whatever the model;
argmax of ``output_0``, one class left out by name), ``tensorConvert.cu`` (nearest neighbour, planar RGB) and
``tensorNet.cpp`` (TensorRT's engine is built from the ONNX file, INT8 only with a calibrator that the command does not have;
labels and colours by line).
"""

from __future__ import annotations

import re

from edgeseg.backends.tensorrt.opset17 import for_tensorrt_8
from edgeseg.handover.contents import Content, graph_bytes, label_lines, labels, readme, require, threshold_words
from edgeseg.handover.face import Face, check, with_face
from edgeseg.runtime.overlay import spec_palette
from edgeseg.spec import IMAGENET_MEAN, IMAGENET_STD
from edgeseg.store.engine import Engine

FACE = Face("input_0", "output_0", "scores", scale=1 / 255, mean=IMAGENET_MEAN, std=IMAGENET_STD)
# A label of nine letters from n on and a space is read as an identifier of ImageNet's and its name.
_SYNSET = re.compile(rb"(?m)^(n.{8}) ")


def contents(engine: Engine) -> dict[str, Content]:
    """The files of the folder, by path.

    Raises:
        SpecError: jetson-inference cannot run the engine.
        BuildError: the graph made does not give the engine's masks, or cannot be written for TensorRT 8.
    """
    spec = engine.manifest.spec
    has_pairs = engine.manifest.precision.requested == "int8"
    floats = "builds TensorRT's engine itself and gives a Q/DQ graph no integers; build with --precision fp16"
    require(
        engine,
        "jetson-inference",
        target="tensorrt",
        fit="resize",
        batch=False,
        channels=(3,),
        others=[(has_pairs, floats)],
    )
    # It is at home on JetPack 4 to 6, where TensorRT 8 reads opset 17 at most; later ones read that too.
    made = for_tensorrt_8(with_face(engine, FACE)).model
    check(made, FACE, engine)
    nobody = next(word for word in ("none", *map(str, range(300))) if word not in {n.lower() for n in labels(spec)})
    start = f"""Start it, in this folder, on a Jetson with jetson-inference; the first start builds TensorRT's engine, which takes
minutes:

    segnet --model=model.onnx --labels=labels.txt --colors=colors.txt --input_blob={FACE.input} \\
        --output_blob={FACE.output} --ignore-class={nobody} street.jpg mask.jpg"""
    notes = (
        f"Images are resized to {spec.input.height}x{spec.input.width} by nearest neighbour, aspect ratio not kept; "
        "edgeseg's own resize is smoother. Frames of that size give the engine's masks.",
        "It normalizes by ImageNet's mean and deviation whatever the model; the graph undoes that.",
        "It computes in FP16 where the GPU has it, whatever the graph's types.",
        f"`--ignore-class={nobody}`: left out, a class named void would never be chosen. {threshold_words(engine)}",
    )
    colours = "".join(f"{red} {green} {blue}\n" for red, green, blue in spec_palette(spec))
    return {
        "model.onnx": graph_bytes(made),
        "labels.txt": _SYNSET.sub(rb"\1_", label_lines(spec)),
        "colors.txt": colours.encode(),
        "README.md": readme(engine, "jetson-inference", start, notes),
    }
