"""Fake-quantizers of a module trained with them: read out of whatever tool made them, and put in edgeseg's own terms.

Each tool has a module that rounds a tensor in the forward pass. Here every one of them is replaced by one class,
:class:`FakeQuantizer`, that computes the same, can be switched off, and leaves a mark in an exported graph. What a tool's own
class says by its attributes:

- torch.ao and torchao (eager ``prepare_qat``, FX, PT2E): ``FakeQuantizeBase``: ``scale``, ``zero_point``, ``quant_min``,
  ``quant_max``, ``ch_axis`` (torch/ao/quantization/fake_quantize.py, torchao/quantization/pt2e/fake_quantize.py);
- NVIDIA's pytorch-quantization and Model Optimizer: ``TensorQuantizer``: ``amax``, ``num_bits``, ``axis``, ``unsigned``,
  ``narrow_range`` (nn/modules/tensor_quantizer.py of both);
- NNCF: ``SymmetricQuantizer``, ``AsymmetricQuantizer``: ``get_parameters_for_torch_fq()`` and their levels
  (nncf/torch/quantization/layers.py).

PT2E's converted graphs have pairs of ``quantized_decomposed`` operators instead, which are replaced in the same way.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgeseg.errors import SpecError
from edgeseg.graph.grid import Grid
from edgeseg.silence import silenced

Mode = Literal["on", "weights", "marked", "off"]

DOMAIN, MARK = "edgeseg", "FakeQuantizer"

TOLERANCE = 0.02
"""Mean difference of the outputs, relative to their mean magnitude, that rounding ties may make between a module and what was
read of it; a quantizer that was read wrongly makes more."""


class FakeQuantizer(nn.Module):
    """Rounds a tensor as the module it stands for did.

    Modes: ``on`` rounds; ``weights`` rounds weights only; ``marked`` the same and leaves a mark for activations in the graph
    that is exported; ``off`` returns what it was given.

    Args:
        scale: float32, one, or one per channel.
        zero_point: int32 of the same shape.
        low, high: smallest and largest integer.
        axis: of the channels; ``None`` for one scale.
    """

    scale: Tensor
    zero_point: Tensor
    rounded: Tensor | None

    def __init__(self, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().float().reshape(-1).clone())
        self.register_buffer("zero_point", zero_point.detach().to(torch.int32).reshape(-1).clone())
        self.low, self.high, self.axis = low, high, axis
        self.mode: Mode = "on"
        self.is_activation: bool | None = None
        # Of a weight: what it is rounded to.
        self.register_buffer("rounded", None, persistent=False)
        single = self.scale.numel() == 1
        self.grid = Grid(float(self.scale), int(self.zero_point), low, high) if single else None
        """``None`` with a scale per channel."""

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x``, or mark it."""
        if self.mode == "off":
            return x
        if self.rounded is not None:
            return self.rounded
        if self.mode == "on" or not self.is_activation:
            return self.round(x)
        grid = self.grid if self.mode == "marked" else None
        return x if grid is None else _mark(x, grid)

    def round(self, x: Tensor) -> Tensor:
        """The nearest integer's value; torch's own operator, whose ties are those of training."""
        if self.scale.numel() == 1:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, self.low, self.high)
        assert self.axis is not None
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, self.axis, self.low, self.high)


def _mark(x: Tensor, grid: Grid) -> Tensor:
    """A node of an exported graph that stands for rounding ``x``; it cannot be run."""
    marked: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{MARK}", (x,), attrs=dataclasses.asdict(grid), dtype=x.dtype, shape=x.shape, version=1
    )
    return marked


class _Refused(nn.Module):
    """Stands for a fake-quantizer that cannot be taken over, which matters only where it takes part."""

    def __init__(self, reason: SpecError) -> None:
        super().__init__()
        self.reason = reason

    def forward(self, x: Tensor) -> Tensor:
        return x

    def refuse(self, _inputs: Any, _result: Any) -> None:
        raise self.reason


@dataclass(frozen=True)
class Reading:
    """What was read of a module.

    Attributes:
        tools: what put its fake-quantizers there.
        off: names of those that were switched off, and of observers, which only watch.
        quantizers: by name, as :func:`settled` left them.
    """

    tools: tuple[str, ...]
    off: tuple[str, ...]
    quantizers: Mapping[str, FakeQuantizer] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """How many of what, for the user."""
        activations = sum(bool(part.is_activation) for part in self.quantizers.values())
        weights = len(self.quantizers) - activations
        by_channel = sum(part.grid is None for part in self.quantizers.values() if part.is_activation)
        left_out = [f"{by_channel} round activations by channel, which no engine does"] if by_channel else []
        left_out += [f"{len(self.off)} are off, or observers"] if self.off else []
        words = f"fake-quantizers of {' and '.join(self.tools)}: {activations} of activations, {weights} of weights"
        return f"{words}; left out: {' and '.join(left_out)}" if left_out else words


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
            quantizer = _Refused(exc)
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


def quantizer_of(name: str, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None) -> FakeQuantizer:
    """The fake-quantizer of these numbers. Raises :class:`SpecError` for one that no int8 engine can take over."""
    if high - low > 255:
        raise refused(name, f"has {high - low + 1} levels, int8 has 256", "train it with 8 bits")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise refused(name, "has a scale that is not positive and finite", "calibrate or train it again")
    if not bool(((zero_point >= low) & (zero_point <= high)).all()):
        raise refused(name, "cannot hold 0 exactly", "train it with a zero point among its integers")
    return FakeQuantizer(scale, zero_point, low, high, axis)


def refused(name: str, what: str, advice: str) -> SpecError:
    """The error for a fake-quantizer that no int8 engine can take over."""
    return SpecError(f"the fake-quantizer {name} {what}, which an int8 engine cannot take over; {advice}")


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


def settled(module: nn.Module, reading: Reading, image: Tensor) -> Reading:
    """Find out which fake-quantizers round weights, and keep what they make of them; those that took part are in the result.

    Args:
        module: from :func:`read_fake_quantizers`, its parameters frozen.
        reading: what was read of it.
        image: float32 ``(N, C, H, W)`` it runs on.

    Raises:
        SpecError: one whose rounding no int8 engine can take over: not calibrated, computed anew for each image, floating
            point, blocks, more than 8 bits, for several weights.
    """
    took_part: dict[FakeQuantizer, str] = {}
    weights: dict[FakeQuantizer, Tensor] = {}

    def watch(name: str, part: FakeQuantizer, x: Tensor, result: Tensor) -> None:
        # Everything else is frozen: a gradient comes from the image only.
        took_part[part] = name
        if x.requires_grad:
            part.is_activation = True
        elif part in weights and not torch.equal(weights[part], result):
            raise refused(name, "rounds several weights", "give each its own")
        else:
            weights[part] = result.detach()

    hooks = [
        part.register_forward_hook(lambda part, inputs, result, name=name: watch(name, part, inputs[0], result))
        for name, part in module.named_modules()
        if isinstance(part, FakeQuantizer)
    ]
    hooks += [part.register_forward_hook(_Refused.refuse) for part in module.modules() if isinstance(part, _Refused)]
    try:
        with silenced(), torch.enable_grad():
            module(image.detach().clone().requires_grad_(True))
    finally:
        for hook in hooks:
            hook.remove()
    for part, rounded in weights.items():
        if part.is_activation:
            raise refused(took_part[part], "rounds a weight and an activation", "give each its own")
        part.is_activation, part.rounded = False, rounded
    return dataclasses.replace(reading, quantizers={name: part for part, name in took_part.items()})


def require_same(original: nn.Module, read: nn.Module, image: Tensor) -> None:
    """Raise :class:`SpecError` unless the module that was read computes what the original computes, rounding ties aside."""
    twin = copy.deepcopy(original)
    for part in twin.modules():
        if "FakeQuantizeBase" in {c.__name__ for c in type(part).__mro__}:
            part.disable_observer()  # type: ignore[operator]  # its scales are those of training
    with silenced(), torch.no_grad():
        expected, got = (_first(network(image)) for network in (twin, read))
    off = float((expected - got).abs().mean() / expected.abs().mean().clamp(min=1e-12))
    if not off <= TOLERANCE:
        raise SpecError(
            f"the module's fake-quantizers were read, but computing with them gives an output {off:.1%} off the module's own: "
            "it does something else beside them; please report the model"
        )


def _first(output: Any) -> Tensor:
    first: Any = output
    while not isinstance(first, Tensor):
        first = next(iter(first.values())) if isinstance(first, dict) else first[0]
    return first


def switched_off(module: nn.Module) -> nn.Module:
    """A copy that rounds nothing: the float network it was trained as."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        if isinstance(part, FakeQuantizer):
            part.mode = "off"
    return twin


@contextmanager
def mode(module: nn.Module, wanted: Mode) -> Iterator[None]:
    """Let the fake-quantizers of ``module`` do so while it is open; those that were switched off stay off."""
    parts = [part for part in module.modules() if isinstance(part, FakeQuantizer) and part.mode != "off"]
    before = [part.mode for part in parts]
    for part in parts:
        part.mode = wanted
    try:
        yield
    finally:
        for part, earlier in zip(parts, before, strict=True):
            part.mode = earlier
