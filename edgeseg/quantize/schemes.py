"""How each target wants its quantized graph: types, symmetry, placement, and the passes that prepare the graph for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class QuantScheme:
    """The rules of one target's Q/DQ graph. :func:`edgeseg.quantize.lint.lint` checks a graph against them.

    Attributes:
        name: key in :data:`SCHEMES`.
        activations: integer type of activations, per tensor.
        symmetric: activation zero points are 0 (``s8`` only); otherwise the range decides.
        weight_bits: of the weights: signed, symmetric, per output channel. 7 where u8 x s8 products are added in pairs
            in 16 bits, which 8-bit weights overflow.
        integer_bias: biases are int32 with scale ``input scale * weight scale``; otherwise they stay float.
        placement: ``operators``: Q/DQ around every operator that has an integer kernel, outputs included, and operators
            that only move data run on the integers themselves (ONNX Runtime fuses DQ-op-Q, and a value that is integer
            stays so). ``inputs``: Q/DQ on the inputs of multiplying layers, residual additions and what feeds them;
            outputs stay float and the target fuses what follows (TensorRT, OpenVINO).
        pairs_before_moves: what a layer reads through a Reshape or Transpose is quantized in front of it: OpenVINO then moves
            integers there, in fewer passes, and the layer in front writes them itself.
        signed_transposed: what a ConvTranspose reads is symmetric s8 where it is negative: oneDNN's INT8 deconvolution
            takes no zero point, and runs in float when it meets one.
        half: what stays float runs in FP16 where its values allow, when modules are asked to stay float.
        passes: graph passes run first, names of :data:`edgeseg.quantize.passes.PASSES`, in order.
    """

    name: str
    activations: Literal["u8", "s8"]
    symmetric: bool
    weight_bits: Literal[7, 8]
    integer_bias: bool
    placement: Literal["operators", "inputs"]
    passes: tuple[str, ...] = ()
    pairs_before_moves: bool = False
    signed_transposed: bool = False
    half: bool = False

    @property
    def weight_limit(self) -> int:
        """Largest quantized weight; the smallest is its negative."""
        return int(2 ** (self.weight_bits - 1) - 1)


_IMAGE_PASSES = ("fold_preprocessing", "pixel_groups")  # the uint8 image is an activation as it is: u8 schemes only
_ONNXRUNTIME_PASSES = (
    "transposed_convolution",
    "nearest_resize",
    "depth_to_space",
    "group_norm",
    "linear_resize",
    "pointwise_head",
)

_OPENVINO_PASSES = ("fold_preprocessing_in_float", "own_transposed_input", "batched_tokens")

SCHEMES: dict[str, QuantScheme] = {
    scheme.name: scheme
    for scheme in (
        QuantScheme(
            "onnxruntime-vnni", "u8", False, 8, True, "operators", (*_IMAGE_PASSES, *_ONNXRUNTIME_PASSES, "wide_head")
        ),
        QuantScheme("onnxruntime-avx2", "u8", False, 7, True, "operators", _IMAGE_PASSES + _ONNXRUNTIME_PASSES),
        QuantScheme("onnxruntime-arm", "s8", False, 8, True, "operators", _ONNXRUNTIME_PASSES),
        QuantScheme("openvino", "u8", False, 8, False, "inputs", _OPENVINO_PASSES, True, signed_transposed=True),
        QuantScheme("openvino-avx2", "u8", False, 7, False, "inputs", _OPENVINO_PASSES, True, signed_transposed=True),
        QuantScheme("tensorrt", "s8", True, 8, False, "inputs", half=True),
    )
}
