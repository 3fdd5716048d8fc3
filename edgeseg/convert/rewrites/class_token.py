"""A class token in front of the tokens, plus position embeddings -> one Pad and one sum.

With a dynamic batch a ViT expands its class token to the batch at run time, to join it to the patches. A row of zeros joined
to them does not depend on the batch; the token itself is added with the position embeddings, in whose first row it is.

Precondition: the sum of a constant ``(1, N, C)`` and a Concat along axis 1 of an Expand of a constant ``(1, 1, C)`` and one
other value of N - 1 tokens; nothing else reads the values between. Postcondition: no such sum is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeseg.convert.rewrites.driver import Rewrite, each
from edgeseg.graph.editing import beside_constant, constant_array, dims, emit, replace, sole_maker, weight


@dataclass(frozen=True)
class _Match:
    patches: ir.Value
    token: NDArray[Any]
    positions: NDArray[Any]


def _match(node: ir.Node) -> _Match | None:
    tokens, positions = beside_constant(node) or (None, None)
    concat = sole_maker(tokens, "Concat")
    if positions is None or concat is None or len(concat.inputs) != 2 or concat.attributes.get_int("axis", 0) != 1:
        return None
    expand, patches = sole_maker(concat.inputs[0], "Expand"), concat.inputs[1]
    token = constant_array(expand.inputs[0]) if expand is not None else None
    shape = dims(patches)
    if token is None or patches is None or shape is None or len(shape) != 3 or None in shape[1:]:
        return None
    # What the Expand makes is then one token for each image: nothing else fits Concat and Add.
    fits = positions.shape == (1, (shape[1] or 0) + 1, shape[2]) and token.shape == (1, 1, shape[2])
    return _Match(patches, token, positions) if fits else None


def _rewrite(node: ir.Node, match: _Match) -> None:
    positions = match.positions.copy()
    positions[:, :1] += match.token
    front = weight(node, np.array([0, 1, 0, 0, 0, 0], np.int64), "class_token_pads")
    padded = emit(node, "Pad", [match.patches, front])
    replace(node.outputs[0], emit(node, "Add", [padded, weight(node, positions, "positions")]))


REWRITE = Rewrite(each(_match, "Add"), _rewrite)
