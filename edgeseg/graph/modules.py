"""The modules of the SMP model, found again in the names of nodes and layers.

Nodes are called after the module they came from (``encoder.layer3.0.conv1/Conv``), and backends keep those names in what
they execute, fused or not.
"""

from __future__ import annotations

import re


def module_of(node_name: str) -> str:
    """``encoder.layer3.0.conv1`` of ``encoder.layer3.0.conv1/Conv``; ``""`` for a node without a module.

    What was made around a node is called after it (``decoder.p5/Conv/weight/DQ``), so the module ends at the first slash.
    """
    module, slash, _ = node_name.partition("/")
    return module if slash and module not in {"edgeseg", "preprocess", "postprocess"} else ""


_TOP = ("encoder", "decoder", "segmentation_head", "classification_head", "preprocess", "postprocess")


# ONNX Runtime's fusions append this to the name of the node they came from.
_TOKEN = re.compile(r"_token_\d+$")


# TensorRT joins the names of fused layers with " + ", and puts some into brackets or after a prefix.
_SEPARATOR = re.compile(r"[\s+(){}\[\],:|]+")


def module_group(name: str) -> str | None:
    """The SMP module a node or fused layer belongs to, ``None`` where its name does not tell.

    ``encoder.layer3.0.conv1/Conv`` -> ``encoder.layer3``; ``encoder.model.blocks.2.0.dw_mid/Conv_token_66`` ->
    ``encoder.blocks.2``; ``decoder.seg_blocks.1.block.0/Relu`` -> ``decoder.seg_blocks.1``; ``segmentation_head.0/Conv`` ->
    ``segmentation_head``. Of a layer fused from several nodes the first counts.
    """
    for word in _SEPARATOR.split(name):
        path = _TOKEN.sub("", word).lstrip("/").partition("/")[0]
        parts = path.split(".")
        if parts[0] in _TOP:
            return _group(parts)
    return None


def _group(parts: list[str]) -> str:
    top, *inner = parts
    if top not in ("encoder", "decoder"):
        return top
    if inner and inner[0] == "model":  # timm's encoders sit one level deeper
        inner = inner[1:]
    if not inner:
        return top
    first, *rest = inner
    # "layer3" and "p4" have their number in the name; "blocks" is a list, whose items are what people know.
    if rest and rest[0].isdigit() and not first[-1].isdigit():
        return f"{top}.{first}.{rest[0]}"
    return f"{top}.{first}"
