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
        pair_limit: largest sum of two neighbouring weights (:func:`edgeseg.quantize.parameters.pair_sums`). Kernels without
            dot-product instructions add two products in 16 bits: 255 times a sum of 128 is the last that fits (``vpmaddubsw``,
            x86 without VNNI), -128 times one of -255 (``smull``, ARM without ``asimddp``). Any two weights are within 256.
    """

    name: str
    activations: Literal["u8", "s8"]
    symmetric: bool
    integer_bias: bool
    placement: Literal["operators", "inputs"]
    passes: tuple[str, ...] = ()
    pairs_before_moves: bool = False
    signed_transposed: bool = False
    half: bool = False
    pair_limit: int = 256

    @property
    def adds_pairs(self) -> bool:
        """Whether there are weights of 8 bits that overflow."""
        return self.pair_limit < 256


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
            "onnxruntime-vnni", "u8", False, True, "operators", (*_IMAGE_PASSES, *_ONNXRUNTIME_PASSES, "wide_head")
        ),
        QuantScheme(
            "onnxruntime-avx2", "u8", False, True, "operators", (*_IMAGE_PASSES, *_ONNXRUNTIME_PASSES), pair_limit=128
        ),
        QuantScheme("onnxruntime-arm", "s8", False, True, "operators", _ONNXRUNTIME_PASSES, pair_limit=255),
        QuantScheme("openvino", "u8", False, False, "inputs", _OPENVINO_PASSES, True, signed_transposed=True),
        QuantScheme(
            "openvino-avx2",
            "u8",
            False,
            False,
            "inputs",
            _OPENVINO_PASSES,
            True,
            signed_transposed=True,
            pair_limit=128,
        ),
        QuantScheme("tensorrt", "s8", True, False, "inputs", half=True),
    )
}
