"""GroupNorm by sums over the image: OpenVINO's MVN wants groups as rows, and turns each image around for them and back.

PyTorch exports GroupNorm as a reshape to ``(N, groups, -1)``, MVN (from InstanceNormalization) and a reshape back. Behind an
integer convolution, whose layout is channels last, the first is a copy of the whole image into another order. Up to
:data:`MOST_CHANNELS` channels OpenVINO makes it one element after the other, which took 40 % of the demo FPN's time. Mean and
mean square per channel, averaged over each group by a 1x1 convolution of constants, need no copy: what is left of each image
is one multiplication and one addition, in any layout.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MOST_CHANNELS = 64
"""Of more, OpenVINO 2026.4 copies in blocks, and nothing is gained (FPN at 256x256, medians in turns: 32 channels 5.7 -> 5.3 ms,
64 6.3 -> 4.9, 96 5.4 -> 5.3, 128 5.9 -> 5.7; CamVid's at 352x480 with 128 channels 13.1 -> 13.6)."""


def replace_group_norm(ov: Any, model: Any) -> int:
    """Rewrite ``model`` (an ``openvino.Model``) in place; returns how many it replaced."""
    count = sum(_replaced(ov, node) for node in model.get_ordered_ops() if node.get_type_name() == "MVN")
    if count:
        model.validate_nodes_and_infer_types()
    return count


def _replaced(ov: Any, mvn: Any) -> bool:
    attributes = mvn.get_attributes()
    before = mvn.input_value(0).get_node()
    axes = mvn.input_value(1).get_node()
    if not attributes["normalize_variance"] or attributes["eps_mode"] != "INSIDE_SQRT":
        return False
    if (
        before.get_type_name() != "Reshape"
        or axes.get_type_name() != "Constant"
        or axes.data.tolist() not in ([2], [-1])
    ):
        return False
    image = before.input_value(0)
    shape, rows = image.get_partial_shape(), mvn.get_output_partial_shape(0)
    if len(shape) != 4 or len(rows) != 3 or not all(shape[i].is_static for i in (1, 2, 3)) or not rows[1].is_static:
        return False
    channels, pixels, groups = (
        shape[1].get_length(),
        shape[2].get_length() * shape[3].get_length(),
        rows[1].get_length(),
    )
    scaled = _affine(mvn, groups)
    if channels > MOST_CHANNELS or channels % groups or scaled is None:
        return False
    after, gain, shift = scaled
    if after.get_output_partial_shape(0) != shape:
        return False
    ops, plane = ov.opset13, np.array([2, 3])
    same = np.arange(channels) // (channels // groups)
    average = (same[:, None] == same).astype(np.float32)[:, :, None, None] / np.float32(channels // groups)

    def over_group(of_channel: Any) -> Any:
        return ops.convolution(of_channel, ops.constant(average), [1, 1], [0, 0], [0, 0], [1, 1])

    mean = over_group(ops.reduce_mean(image, plane, keep_dims=True))
    length = ops.reduce_l2(image, plane, keep_dims=True)
    square = over_group(ops.multiply(ops.multiply(length, length), ops.constant(np.float32(1 / pixels))))
    variance = ops.maximum(ops.subtract(square, ops.multiply(mean, mean)), ops.constant(np.float32(0)))
    steep = ops.power(ops.add(variance, ops.constant(np.float32(attributes["eps"]))), ops.constant(np.float32(-0.5)))
    by_channel = [
        np.repeat(values, channels // groups).astype(np.float32).reshape(1, -1, 1, 1) for values in (gain, shift)
    ]
    factor = ops.multiply(steep, ops.constant(by_channel[0]))
    offset = ops.subtract(ops.constant(by_channel[1]), ops.multiply(mean, factor))
    result = ops.add(ops.multiply(image, factor), offset)
    for target in after.output(0).get_target_inputs():
        target.replace_source_output(result.output(0))
    return True


def _affine(mvn: Any, groups: int) -> tuple[Any, Any, Any] | None:
    """(the reshape back, gain and shift of each group before it), ``None`` where something else follows."""
    gain, shift, node = np.ones(groups), np.zeros(groups), mvn
    while True:
        readers = [target.get_node() for target in node.output(0).get_target_inputs()]
        others = [reader for reader in readers if reader.get_type_name() != "ShapeOf"]
        if len(others) != 1:
            return None
        (node,) = others
        kind = node.get_type_name()
        if kind == "Reshape":
            return node, gain, shift
        operands = [node.input_value(i).get_node() for i in range(node.get_input_size())]
        # A constant may have got its rank by a reshape.
        operands = [o.input_value(0).get_node() if o.get_type_name() == "Reshape" else o for o in operands]
        values = next((o.data.reshape(-1) for o in operands if o.get_type_name() == "Constant"), None)
        if kind not in ("Multiply", "Add") or values is None or values.size not in (1, groups):
            return None
        if kind == "Multiply":
            gain, shift = gain * values, shift * values
        else:
            shift = shift + values
