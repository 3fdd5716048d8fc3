"""Fake-quantizers of a module trained with them, read out of whatever tool made them.

Each tool has a module that rounds a tensor in the forward pass. Here every one of them is replaced by a
:class:`~edgeseg.convert.fake_quantizers.FakeQuantizer`. What a tool's own class says by its attributes:

- torch.ao and torchao (eager ``prepare_qat``, FX, PT2E): ``FakeQuantizeBase``: ``scale``, ``zero_point``, ``quant_min``,
  ``quant_max``, ``ch_axis`` (torch/ao/quantization/fake_quantize.py, torchao/quantization/pt2e/fake_quantize.py);
- NVIDIA's pytorch-quantization and Model Optimizer: ``TensorQuantizer``: ``amax``, ``num_bits``, ``axis``, ``unsigned``,
  ``narrow_range`` (nn/modules/tensor_quantizer.py of both);
- NNCF: ``SymmetricQuantizer``, ``AsymmetricQuantizer``: ``get_parameters_for_torch_fq()`` and their levels
  (nncf/torch/quantization/layers.py).

PT2E's converted graphs have pairs of ``quantized_decomposed`` operators instead, which are replaced in the same way.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import nn

from edgeseg.convert.fake_quantizers import FakeQuantizer, Reading, Refused, quantizer_of, refused
from edgeseg.errors import SpecError


def read_fake_quantizers(module: nn.Module) -> tuple[nn.Module, Reading | None]:
    """Replace every fake-quantizer of ``module``, in place where that can be; ``None``: it has none.

    Raises:
        SpecError: a module that was converted to integers already, or exported in training mode.
    """
    own = {name: part for name, part in module.named_modules() if isinstance(part, FakeQuantizer)}
    if own:
        return module, Reading((ONNX_FILE,), (), own)
    _refuse_converted(module)
    tools: Counter[str] = Counter()
    off: list[str] = []
    inside: set[nn.Module] = set()
    for name, part in list(module.named_modules()):
        tool = None if part in inside else _tool(part)
        if tool is None:
            continue
        inside.update(part.modules())  # its observer goes with it
        quantizer: nn.Module | None
        try:
            quantizer = None if tool == _WATCHES else _READERS[tool](name, part)
        except SpecError as exc:
            quantizer = Refused(exc)
        if quantizer is None:
            off.append(name)
        else:
            tools[tool] += 1
        _replace(module, part, nn.Identity() if quantizer is None else quantizer)
    if isinstance(module, torch.fx.GraphModule):
        _refuse_training(module)
    if isinstance(module, torch.fx.GraphModule) and (count := _replace_pairs(module)):
        tools[_PT2E] += count
    return module, Reading(tuple(tools), tuple(off)) if tools else None


def _replace(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Wherever ``old`` stands: tools share one quantizer between values that have one scale."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


ONNX_FILE = "the ONNX file"
_TORCH, _PT2E, _NVIDIA, _NNCF = "torch.ao", "PT2E", "NVIDIA's TensorQuantizer", "NNCF"
_WATCHES = "an observer"


def _tool(part: nn.Module) -> str | None:
    classes = {(c.__name__, c.__module__.partition(".")[0]) for c in type(part).__mro__}
    names = {name for name, _ in classes}
    if "FakeQuantizeBase" in names:
        return _TORCH
    if "TensorQuantizer" in names or "SequentialQuantizer" in names:
        return _NVIDIA
    if ("BaseQuantizer", "nncf") in classes:
        return _NNCF
    if names & {"ObserverBase", "AffineQuantizedObserverBase"}:
        return _WATCHES
    if any(package == "brevitas" for _, package in classes) and "Proxy" in type(part).__name__:
        raise SpecError(
            "the module is quantized by Brevitas, whose quantizers are not read here; export it to ONNX with Q/DQ "
            "(brevitas.export.export_onnx_qcdq) and read its scales there, or give the float module with --calibration"
        )
    return None


def _of_torch(name: str, part: Any) -> FakeQuantizer | None:
    if not int(part.fake_quant_enabled[0]):
        return None
    if getattr(part, "is_dynamic", False):
        raise refused(name, "computes its scale anew for each image", "train it with static ranges")
    scale, zero_point = part.scale, part.zero_point
    observer = getattr(part, "activation_post_process", None)
    seen = getattr(observer, "min_val", None)
    if seen is not None and (seen.numel() == 0 or not bool(torch.isfinite(seen).all())) and bool((scale == 1).all()):
        raise refused(name, "has seen no data", "run training images through the module first")
    # The observer knows the integers of a quantizer that was not told them.
    low, high = (
        getattr(observer, which, None) if getattr(part, which, None) is None else getattr(part, which)
        for which in ("quant_min", "quant_max")
    )
    axis = int(part.ch_axis) if scale.numel() > 1 else None
    return quantizer_of(name, scale, zero_point, int(low), int(high), axis)  # type: ignore[arg-type]


def _of_nvidia(name: str, part: Any) -> FakeQuantizer | None:
    if type(part).__name__ == "SequentialQuantizer":
        raise refused(name, "is a sequence of quantizers", "use one per tensor")
    state = vars(part)
    if state.get("_disabled") or not state.get("_if_quant", True):
        return None
    bits = state.get("_num_bits")
    if not isinstance(bits, int):
        raise refused(name, f"has floating-point numbers of {bits} bits", "use integers: mtq.INT8_DEFAULT_CFG")
    if state.get("_dynamic") or getattr(part, "_amax", None) is None:
        raise refused(name, "has no amax", "calibrate the module (load_calib_amax, mtq.calibrate) first")
    others = {
        "_block_sizes": "blocks",
        "_bias": "a bias",
        "_rotate": "a rotation",
        "_pre_quant_scale": "a pre_quant_scale",
    }
    for attribute, what in others.items():
        if getattr(part, attribute, None):
            raise refused(name, f"has {what}", "use one scale per tensor or channel")
    if not state.get("_fake_quant", True):
        raise refused(name, "holds integers", "give the module before it was compressed")
    clip = getattr(part, "clip", None) if state.get("_learn_amax") else None
    amax = part._amax if clip is None else torch.maximum(-clip.clip_value_min, clip.clip_value_max)
    amax = amax.detach().float() * (1.0 if state.get("_scale_amax") is None else state["_scale_amax"])
    unsigned = bool(state.get("_unsigned"))
    high = (1 << (bits - 1 + int(unsigned))) - 1
    low = 0 if unsigned else -high - (0 if state.get("_narrow_range") else 1)
    return quantizer_of(name, amax / high, torch.zeros(amax.numel()), low, high, _axis_of(name, tuple(amax.shape)))


def _of_nncf(name: str, part: Any) -> FakeQuantizer | None:
    if not part.is_enabled_quantization():
        return None
    if hasattr(part, "lora_A"):
        raise refused(name, "has LoRA adapters", "strip them first: nncf.strip(model)")
    _, _, scale, zero_point = part.get_parameters_for_torch_fq()
    low, high = int(part.level_low), int(part.level_high)
    return quantizer_of(name, scale, zero_point, low, high, _axis_of(name, tuple(part._scale_shape)))


_READERS = {_TORCH: _of_torch, _NVIDIA: _of_nvidia, _NNCF: _of_nncf}


def _axis_of(name: str, shape: tuple[int, ...]) -> int | None:
    """The axis that a scale shaped to be broadcast runs along."""
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    if len(axes) > 1:
        raise refused(name, f"has scales of shape {shape}", "use one per tensor or channel")
    return axes[0] if axes else None


_CONVERTED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")


def _refuse_converted(module: nn.Module) -> None:
    for name, part in module.named_modules():
        kind = type(part)
        # Its FloatFunctional is the one that computes in float.
        if kind.__module__.startswith(_CONVERTED) and not kind.__name__.endswith("FloatFunctional"):
            raise SpecError(
                f"the module was converted to integers ({name or 'it'} is a quantized {kind.__name__}); give it as it was "
                "before convert(), with its fake-quantizers"
            )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if type(tensor).__module__.startswith("torchao."):
            raise SpecError(
                f"the weight {name} is a {type(tensor).__name__} of torchao, which holds integers; give the module before "
                "quantize_(), or one with fake-quantizers (prepare_qat_pt2e)"
            )


_TRAINING_ARGUMENT = {"aten::dropout": 2, "aten::batch_norm": 5}


def _refuse_training(module: torch.fx.GraphModule) -> None:
    """An exported graph has its mode written into it."""
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        index = _TRAINING_ARGUMENT.get(getattr(schema, "name", ""))
        if index is not None and len(node.args) > index and node.args[index] is True:
            raise SpecError(
                f"the exported module is in training mode ({node.name}); call move_exported_model_to_eval(model) of "
                "torchao.quantization.pt2e first"
            )


def _replace_pairs(module: torch.fx.GraphModule) -> int:
    """Replace the Q/DQ pairs of a graph that PT2E converted, and the integers of its weights; returns how many pairs."""
    graph, count, replaced = module.graph, 0, set()
    for node in list(graph.nodes):
        what = "" if node in replaced else _decomposed(node)
        if what.startswith("quantize_per_tensor"):
            scale, zero_point, low, high = (_constant(module, argument) for argument in node.args[1:5])
            name = f"fake_quantizer_{count}"
            quantizer = quantizer_of(
                node.name, torch.as_tensor(scale), torch.as_tensor(zero_point), int(low), int(high), None
            )
            module.add_submodule(name, quantizer)
            with graph.inserting_after(node):
                new = graph.call_module(name, (node.args[0],))
            for reader in list(node.users):
                if not _decomposed(reader).startswith("dequantize_per_tensor"):
                    raise SpecError(
                        f"the module computes with integers ({reader.name}); convert it without lowering: "
                        "convert_pt2e(model, use_reference_representation=False)"
                    )
                reader.replace_all_uses_with(new)
                replaced.add(reader)
                graph.erase_node(reader)
            graph.erase_node(node)
            count += 1
        elif what.startswith("dequantize_per") and node.args[0].op == "get_attr":
            arguments = [_constant(module, argument) for argument in node.args]
            kwargs = {key: value for key, value in node.kwargs.items() if key != "out_dtype"}
            with torch.no_grad():
                weight = node.target(*arguments, **kwargs)
            name = f"dequantized_{node.name}"
            module.register_buffer(name, weight)
            with graph.inserting_after(node):
                node.replace_all_uses_with(graph.get_attr(name))
            graph.erase_node(node)
    if count:
        graph.eliminate_dead_code()
        module.recompile()
    return count


def _decomposed(node: torch.fx.Node) -> str:
    """The name of a node's ``quantized_decomposed`` operator, or ``""``."""
    target = node.target
    is_one = node.op == "call_function" and getattr(target, "namespace", "") == "quantized_decomposed"
    return str(target._opname) if is_one else ""  # type: ignore[union-attr]


def _constant(module: torch.fx.GraphModule, argument: Any) -> Any:
    if not isinstance(argument, torch.fx.Node):
        return argument
    if argument.op != "get_attr":
        raise SpecError(
            f"the scale of {argument.name} is computed anew for each image, which an int8 engine cannot take over; quantize "
            "with static ranges"
        )
    return operator.attrgetter(str(argument.target))(module)
