"""Chains of Reshape, Transpose, Squeeze and Unsqueeze that a shorter chain equals.

Encoders hand out (N, C, H, W) and decoders flatten it again (dpt), so chains often undo themselves. They only
move elements: a chain is run on the indices of a value of its input's shape, and compared with identity, one
Reshape and one Transpose.

Precondition: constant targets; shapes static, but for a batch on axis 0; nothing else reads the values between.
Postcondition: no chain is left that one node fewer equals (nor a Transpose that a Reshape equals: that moves
nothing).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeseg.convert.rewrites.driver import Rewrite, each
from edgeseg.graph.editing import constant_array, dims, emit, given, replace, sole_maker, weight
from edgeseg.graph.proto import REARRANGES

_PROBED_BATCHES = (2, 3)


_Simpler = tuple[str, tuple[int, ...]]


def _match(node: ir.Node) -> tuple[list[ir.Node], _Simpler] | None:
    """The longest chain that ends in ``node`` and has a simpler form."""
    chain = [node]
    while (before := sole_maker(chain[0].inputs[0], *REARRANGES)) is not None:
        chain.insert(0, before)
    for start in range(len(chain)):
        simpler = _simpler(chain[start:])
        if simpler is not None:
            return chain[start:], simpler
    return None


def _simpler(chain: Sequence[ir.Node]) -> _Simpler | None:
    source, result = dims(chain[0].inputs[0]), dims(chain[-1].outputs[0])
    shapes = [source, *(dims(n.outputs[0]) for n in chain)]
    if source is None or result is None or any(s is None or None in s[1:] for s in shapes):
        return None
    if any(n.op_type == "Reshape" and constant_array(n.inputs[1]) is None for n in chain):
        return None
    if (source[:1] == (None,)) != (result[:1] == (None,)):
        return None
    dynamic = source[:1] == (None,)
    # axis 0 may be batch here and batch times tokens there: probe multiples that divide evenly everywhere
    known = [math.prod(d for d in s if d is not None) for s in shapes if s is not None]
    unit = math.lcm(*known) // known[0]
    moved = [_run(chain, b * unit) for b in (_PROBED_BATCHES if dynamic else (0,))]
    options: list[_Simpler] = [("Identity", ())]
    if len(chain) > 1 or chain[0].op_type == "Transpose":
        options.append(("Reshape", tuple(-1 if d is None else d for d in result)))
    if len(chain) > 1 and len(source) == len(result):
        perm = _permutation(moved[0][0].shape, moved[0][1])
        if perm is not None:
            options.append(("Transpose", perm))
    for option in options:
        if all(m is not None and np.array_equal(_as(option, m[0], m[1].shape), m[1]) for m in moved):
            if option[0] == "Identity" and source != result:
                continue
            return option
    return None


def _as(option: _Simpler, start: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.int64]:
    kind, numbers = option
    if kind == "Transpose":
        return np.transpose(start, numbers)
    return start.reshape(shape) if kind == "Reshape" else start


def _run(chain: Sequence[ir.Node], batch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the chain's input, and where the chain moves them; ``batch`` stands for an unknown axis 0."""
    start = [batch if d is None else d for d in dims(chain[0].inputs[0]) or ()]
    indices = np.arange(int(np.prod(start)), dtype=np.int64).reshape(start)
    moved = indices
    for node in chain:
        if node.op_type == "Transpose":
            moved = np.transpose(moved, node.attributes.get_ints("perm", ()) or None)
        else:
            # what is unknown (batch, or batch times tokens) follows from the number of elements
            moved = moved.reshape([-1 if d is None else d for d in dims(node.outputs[0]) or ()])
    return indices, moved


def _permutation(shape: tuple[int, ...], moved: NDArray[np.int64]) -> tuple[int, ...] | None:
    """The only permutation of ``shape``'s axes that could make ``moved`` of its indices, judged by strides."""
    strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    free = [i for i, d in enumerate(shape) if d == 1]
    perm = []
    for axis, size in enumerate(moved.shape):
        if size == 1:
            candidates = free
        else:
            one = [0] * moved.ndim
            one[axis] = 1
            step = int(moved[tuple(one)] - moved[(0,) * moved.ndim])
            candidates = [i for i, d in enumerate(shape) if d == size and strides[i] == step and i not in perm]
        if not candidates:
            return None
        perm.append(candidates[0])
        free = [i for i in free if i != candidates[0]]
    return tuple(perm)


def _rewrite(last: ir.Node, match: tuple[list[ir.Node], _Simpler]) -> None:
    chain, (kind, numbers) = match
    source = given(chain[0])
    shape = last.outputs[0].shape
    if kind == "Identity":
        new = source
        if last.outputs[0].is_graph_output():
            new = emit(last, "Identity", [source], shape=shape)
    elif kind == "Reshape":
        new = emit(last, "Reshape", [source, weight(last, np.array(numbers, np.int64), "shape")], shape=shape)
    else:
        new = emit(last, "Transpose", [source], {"perm": list(numbers)}, shape=shape)
    replace(last.outputs[0], new)


REWRITE = Rewrite(each(_match, *REARRANGES), _rewrite)
