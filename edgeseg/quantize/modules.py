"""The modules of a float graph whose precision can be chosen, each by itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from edgeseg.graph.editing import constant_input
from edgeseg.graph.modules import module_group, module_of


@dataclass(frozen=True)
class Modules:
    """What a network consists of, in the words of the SMP model.

    A module without a layer of its own (an activation, a sum) belongs to the one that makes what it reads: they fuse.

    Attributes:
        names: in the graph's order, such as ``encoder.layer3`` or ``decoder.seg_blocks.2``.
        owners: by what :func:`module_group` says of a node's name: the one of ``names`` it belongs to.
    """

    names: tuple[str, ...]
    owners: Mapping[str, str]

    @classmethod
    def of(cls, graph: ir.Graph) -> Modules:
        """Find them in a float graph as it was exported, before any pass of a target."""
        groups = {node: _group_of(str(node.name)) for node in graph}
        multiplying = (node for node in graph if node.op_type in _MULTIPLIES and constant_input(node, 1) is not None)
        weighted = {group for node in multiplying if (group := groups[node]) is not None}
        owners = {group: group for group in weighted}
        for node, group in groups.items():
            if group is None or group in owners or group in _SURROUNDINGS:
                continue
            makers = (value.producer() for value in node.inputs if value is not None)
            known = (owners.get(groups[maker] or "") for maker in makers if maker is not None)
            owner = next((name for name in known if name is not None), None)
            if owner is not None:
                owners[group] = owner
        return cls(tuple(dict.fromkeys(g for g in groups.values() if g in weighted and g is not None)), owners)

    def holds(self, names: Collection[str]) -> Callable[[ir.Node], bool]:
        """Of a node: whether it belongs to one of these modules."""
        chosen = frozenset(names)
        return lambda node: bool(chosen) and self.owner(str(node.name)) in chosen

    def owner(self, node_name: str) -> str | None:
        """The module of a node, of one that a pass made around it too; ``None`` for what surrounds the network."""
        return self.owners.get(_group_of(node_name) or "")


_SURROUNDINGS = frozenset({"preprocess", "postprocess"})
_MULTIPLIES = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def _group_of(name: str) -> str | None:
    """:func:`module_group`; in a network that is none of SMP's the first two steps of the module's path."""
    return module_group(name) or ".".join(module_of(name).split(".")[:2]) or None
