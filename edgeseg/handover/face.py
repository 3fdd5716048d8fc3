"""The network of an engine folder behind the input and output that another host knows.

The hosts hand over float32 ``(N, C, H, W)`` and do the argmax themselves, or want class indices of another type and shape. What
lies between the image and the scores that decide stays as it was built and verified, node for node, quantized or not: in
front, the host's normalization is undone and rounded, which gives the very pixels back; behind, the mask's ending is
replaced. Every graph made here is run in ONNX Runtime against the engine's own before it is handed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgeseg.backends.portable import open_graph
from edgeseg.errors import BuildError, SpecError
from edgeseg.graph.editing import Editor, constant_array, maker, tidy
from edgeseg.graph.running import GraphSession
from edgeseg.spec import PipelineSpec
from edgeseg.store.engine import Engine
from edgeseg.store.onnx_file import read_onnx

LEAST_AGREEMENT = 0.999
"""Of the masks with the engine's own. They are the same but where a softmax rounds two classes to one probability."""

_PLANAR = (0, 3, 1, 2)


@dataclass(frozen=True)
class Face:
    """What a host hands to the network and wants from it.

    Attributes:
        input: name of the image, float32 ``(N, C, H, W)`` RGB.
        output: name of the result.
        answer: ``scores`` or ``probabilities``: float32 ``(N, classes, H, W)``, the highest of a pixel is its class;
            ``classes``: their indices, int32 ``(N, H, W, 1)``. A binary model has two classes here, the first is background:
            0 and what its score is above the engine's threshold.
        scale, mean, std: what the host makes of a pixel 0..255: ``(pixel * scale - mean) / std`` per channel.
    """

    input: str
    output: str
    answer: Literal["scores", "probabilities", "classes"]
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def normalized(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 ``(N, H, W, C)`` as the host hands it over."""
        values = (images * self.scale - np.array(self.mean)) / np.array(self.std)
        return np.ascontiguousarray(values.transpose(_PLANAR), np.float32)

    def mask(self, answer: NDArray[np.generic]) -> NDArray[np.generic]:
        """``(N, H, W)`` as the host makes it of the answer."""
        return answer[..., 0] if self.answer == "classes" else np.asarray(answer.argmax(axis=1))


def with_face(engine: Engine, face: Face, metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """The engine's portable graph behind ``face``, with ``metadata`` beside it, checked against it in ONNX Runtime.

    Args:
        engine: of output ``mask``, multiclass or binary, static size.
        face: the host's.
        metadata: ``metadata_props`` of the file.

    Raises:
        SpecError: its mask is made in no way known here.
        BuildError: the graph made does not give the engine's masks.
        ArtifactError: the graph cannot be read or run.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    model = ir.serde.deserialize_model(read_onnx(engine.graph_path))
    tidy(model)  # for the types and shapes of every value
    _put_input(model, face)
    _put_output(model, face, engine.manifest.spec.model.classes)
    tidy(model)
    model.metadata_props.clear()
    model.metadata_props.update(metadata or {})
    made = ir.serde.serialize_model(model)
    check(made, face, engine)
    return made


def _put_input(model: ir.Model, face: Face) -> None:
    graph = model.graph
    (image,) = graph.inputs
    assert image.shape is not None
    batch, height, width, channels = image.shape
    given = ir.Value(
        name=face.input, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((batch, channels, height, width))
    )
    edit = Editor(graph, graph[0], "face")
    pixels = given
    # One multiply-add back to 0..255, then to the nearest integer: exactly the pixel the host began with.
    factor, offset = (
        np.array(values, np.float32).reshape(1, -1, 1, 1) / np.float32(face.scale) for values in (face.std, face.mean)
    )
    if np.any(factor != 1) or np.any(offset != 0):
        if np.any(factor != 1):
            pixels = edit.op("Mul", "Mul", [pixels, edit.constant("factor", factor)], shape=given.shape)
        if np.any(offset != 0):
            pixels = edit.op("Add", "Add", [pixels, edit.constant("offset", offset)], shape=given.shape)
        pixels = edit.op("Round", "Round", [pixels], shape=given.shape)
    interleaved = edit.op("Transpose", "Transpose", [pixels], shape=image.shape, perm=[0, 2, 3, 1])
    for use in list(image.uses()):
        node = use.node
        if node.op_type != "Cast":
            # uint8 inside a graph is for ONNX Runtime; TensorRT's graphs cast the image first.
            cast = edit.op(
                "Cast", "Cast", [interleaved], dtype=ir.DataType.UINT8, shape=image.shape, to=ir.DataType.UINT8
            )
            node.replace_input_with(use.idx, cast)
            continue
        (real,) = node.outputs
        for reader in list(real.consumers()):
            planar = reader.op_type == "Transpose" and tuple(reader.attributes.get_ints("perm", [])) == _PLANAR
            old, new = (reader.outputs[0], pixels) if planar else (real, interleaved)
            if real.dtype != ir.DataType.FLOAT:
                new = edit.op(
                    "Cast", "Cast", [new], dtype=real.dtype or ir.DataType.FLOAT, shape=new.shape, to=real.dtype
                )
            old.replace_all_uses_with(new)
    graph.inputs[:] = [given]


def _put_output(model: ir.Model, face: Face, classes: int) -> None:
    graph = model.graph
    value: ir.Value | None = next(output for output in graph.outputs if output.name == "mask")
    while ending := maker(value, "Cast", "Squeeze", "Reshape", "Identity"):
        value = ending.inputs[0]
    decided = maker(value, "ArgMax", "Greater")
    scores = None if decided is None else decided.inputs[0]
    shape = None if scores is None else scores.shape
    if decided is None or scores is None or shape is None or decided.attributes.get_int("axis", 1) != 1:
        raise SpecError("the engine's mask is made in a way that cannot be shown to another host; build it again")
    last = graph[-1]
    edit = Editor(graph, last, "face", after=True)
    if decided.op_type == "ArgMax" and shape[1] != classes:
        # Classes that never win fill a kernel's blocks; the host knows nothing of them.
        scores = edit.first_channels("classes", scores, classes)
        shape = ir.Shape((shape[0], classes, *shape[2:]))
    if scores.dtype != ir.DataType.FLOAT:
        scores = edit.op("scores", "Cast", [scores], shape=shape, to=ir.DataType.FLOAT)
    if decided.op_type == "Greater":
        limit = constant_array(decided.inputs[1])
        if limit is None:
            raise SpecError("the engine's mask has no constant threshold; build it again")
        # Twice the same class: 0 for the background, above 0 where the engine says 1.
        above = edit.op("above", "Sub", [scores, edit.constant("limit", limit.astype(np.float32))], shape=shape)
        none = edit.op("none", "Mul", [above, edit.constant("zero", np.float32(0))], shape=shape)
        shape = ir.Shape((shape[0], 2, *shape[2:]))
        scores = edit.op("planes", "Concat", [none, above], shape=shape, axis=1)
    if face.answer == "probabilities":
        answer = edit.op("answer", "Softmax", [scores], shape=shape, axis=1)
    elif face.answer == "scores":
        answer = edit.op("answer", "Identity", [scores], shape=shape)
    else:
        pixels = (shape[0], *shape[2:])
        index = edit.op("index", "ArgMax", [scores], dtype=ir.DataType.INT64, shape=pixels, axis=1, keepdims=0)
        index = edit.op("int32", "Cast", [index], dtype=ir.DataType.INT32, shape=pixels, to=ir.DataType.INT32)
        last_axis = edit.constant("last_axis", np.array([-1], np.int64))
        answer = edit.op("answer", "Unsqueeze", [index, last_axis], dtype=ir.DataType.INT32, shape=(*pixels, 1))
    graph.outputs[:] = [answer]
    for taken in (value for node in graph for value in node.outputs if value.name == face.output):
        taken.name = f"{face.output}_before"
    answer.name = face.output


def check(made: onnx.ModelProto, face: Face, engine: Engine) -> None:
    """Raise ``BuildError`` unless ``made``, with what the host does around it, gives the engine's masks of an image.

    Both run in ONNX Runtime as they are written, so that nothing but the face can differ.
    """
    images = _picture(engine.manifest.spec)
    with open_graph(engine) as session:
        expected = session.run(images)["mask"]
    (answer,) = GraphSession(made, "the graph made for the host", BuildError).run(face.normalized(images)).values()
    agreement = float(np.mean(face.mask(answer) == expected))
    if agreement < LEAST_AGREEMENT:
        raise BuildError(
            f"the graph made for the host agrees with the engine on {agreement:.1%} of the pixels of an image, less than "
            f"{LEAST_AGREEMENT:.1%}; nothing was written"
        )


def _picture(spec: PipelineSpec) -> NDArray[np.uint8]:
    """Blocks of every brightness and colour, for masks of more than one class."""
    size = spec.input
    blocks = np.random.default_rng(0).integers(0, 256, (size.batch.minimum, 8, 8, size.channels), dtype=np.uint8)
    tall, wide = -(-size.height // 8), -(-size.width // 8)
    large = blocks.repeat(tall, axis=1).repeat(wide, axis=2)[:, : size.height, : size.width]
    noise = np.random.default_rng(1).integers(0, 32, large.shape, dtype=np.uint8)
    return np.ascontiguousarray(np.where(large < 224, large + noise, large - noise), np.uint8)
