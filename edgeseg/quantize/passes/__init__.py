"""Graph passes that prepare a float graph for one target's kernels, one a file.

Unlike the rewrites of :mod:`edgeseg.convert.rewrites`, which help everywhere and run before calibration, these know
what a runtime is fast at, run on the calibrated graph, and say which range a value they make has. Each keeps the
graph's float results equal.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgeseg.quantize.observed import Pass
from edgeseg.quantize.passes.batched_tokens import batched_tokens
from edgeseg.quantize.passes.depth_to_space import depth_to_space
from edgeseg.quantize.passes.fold_preprocessing import fold_preprocessing, fold_preprocessing_in_float
from edgeseg.quantize.passes.group_norm import group_norm
from edgeseg.quantize.passes.linear_resize import linear_resize
from edgeseg.quantize.passes.nearest_resize import nearest_resize
from edgeseg.quantize.passes.own_transposed_input import own_transposed_input
from edgeseg.quantize.passes.pixel_groups import pixel_groups
from edgeseg.quantize.passes.pointwise_head import pointwise_head
from edgeseg.quantize.passes.transposed_convolution import transposed_convolution
from edgeseg.quantize.passes.wide_head import wide_head

PASSES: Mapping[str, Pass] = {
    "batched_tokens": batched_tokens,
    "depth_to_space": depth_to_space,
    "fold_preprocessing": fold_preprocessing,
    "fold_preprocessing_in_float": fold_preprocessing_in_float,
    "group_norm": group_norm,
    "linear_resize": linear_resize,
    "nearest_resize": nearest_resize,
    "own_transposed_input": own_transposed_input,
    "pixel_groups": pixel_groups,
    "pointwise_head": pointwise_head,
    "transposed_convolution": transposed_convolution,
    "wide_head": wide_head,
}
