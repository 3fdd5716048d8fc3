"""Fake-quantizers of each tool are read for what they compute, or refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgeseg.errors import SpecError
from edgeseg.graph.grid import Grid

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
from torch import nn  # noqa: E402
from torch.ao import quantization as ao  # noqa: E402

from edgeseg.convert.fake_quantizers import FakeQuantizer, mode, require_same, settled, switched_off  # noqa: E402
from edgeseg.convert.marks import drop_marks, take_marks  # noqa: E402
from edgeseg.convert.training_tools import read_fake_quantizers  # noqa: E402

IMAGE = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 3 - 1


def network() -> Any:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)]
    module = nn.Sequential(*layers)
    module[1].running_mean.uniform_(-1, 1)
    module[1].running_var.uniform_(0.5, 2)
    nn.init.uniform_(module[1].weight, -2, 2)
    return module


def prepared(backend: str = "qnnpack", *, fused: bool = True, runs: int = 2) -> Any:
    """By torch.ao's eager mode, behind a ``QuantStub``."""
    module = network().train()
    if fused:
        ao.fuse_modules_qat(module, [["0", "1", "2"]], inplace=True)
    module = nn.Sequential(ao.QuantStub(), module)
    module.qconfig = ao.get_default_qat_qconfig(backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ao.prepare_qat(module.train(), inplace=True)
    for _ in range(runs):
        module(IMAGE)
    return module.eval()


def read(module: Any) -> Any:
    result, reading = read_fake_quantizers(module)
    assert reading is not None
    result.requires_grad_(False)
    return result, settled(result, reading, IMAGE)


@pytest.mark.parametrize("backend", ["qnnpack", "fbgemm", "x86"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_module_of_torch_computes_the_same_without_its_own_quantizers(backend: str, fused: bool) -> None:
    module = prepared(backend, fused=fused)
    module.apply(ao.disable_observer)
    with torch.no_grad():
        expected = module(IMAGE)
    result, reading = read(module)
    assert not any(isinstance(part, ao.FakeQuantizeBase) for part in result.modules())
    with torch.no_grad():
        assert torch.equal(result(IMAGE), expected)
    activations = [q for q in reading.quantizers.values() if q.is_activation]
    weights = [q for q in reading.quantizers.values() if not q.is_activation]
    # Of the stub, of both convolutions and, where it is a layer of its own, of the normalization.
    assert (len(activations), len(weights)) == (3 if fused else 4, 2)
    assert {q.high for q in activations} == {255 if backend == "qnnpack" else 127}
    assert {q.axis for q in weights} == {None if backend == "qnnpack" else 0}
    assert f"torch.ao: {len(activations)} of activations, 2 of weights" in reading.words


def test_a_graph_that_fx_prepared_is_read() -> None:
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = prepare_qat_fx(network().train(), ao.get_default_qat_qconfig_mapping("qnnpack"), (IMAGE,))
    module(IMAGE)
    module.eval().apply(ao.disable_observer)
    with torch.no_grad():
        expected = module(IMAGE)
    result, reading = read(module)
    assert sum(bool(q.is_activation) for q in reading.quantizers.values()) == 3
    assert len(reading.quantizers) == 5
    with torch.no_grad():
        assert torch.equal(result(IMAGE), expected)


def test_modes() -> None:
    module = prepared()
    module.apply(ao.disable_observer)
    plain = prepared()
    plain.apply(ao.disable_observer)
    result, _ = read(module)
    with torch.no_grad():
        plain.apply(ao.disable_fake_quant)
        floating = plain(IMAGE)
        with mode(result, "off"):
            assert torch.allclose(result(IMAGE), floating, atol=1e-6)
        with mode(result, "weights"):
            some = result(IMAGE)
        assert torch.allclose(switched_off(result)(IMAGE), floating, atol=1e-6)
        rounded = result(IMAGE)
    assert float((some - floating).abs().max()) > 0
    assert float((rounded - some).abs().max()) > 0


def test_a_quantizer_that_is_off_and_an_observer_are_left_out() -> None:
    module = prepared()
    module[1][0].activation_post_process.disable_fake_quant()
    module.append(ao.MinMaxObserver())
    _, reading = read(module)
    assert sum(bool(q.is_activation) for q in reading.quantizers.values()) == 2
    assert reading.words.endswith("; left out: 2 are off, or observers")
    assert read_fake_quantizers(network())[1] is None
    assert read_fake_quantizers(nn.Sequential(network(), ao.MinMaxObserver()))[1] is None


def test_what_was_read_wrongly_is_found() -> None:
    module = prepared()
    result, reading = read_fake_quantizers(prepared())
    assert reading is not None
    require_same(module, result, IMAGE)
    next(q for q in result.modules() if isinstance(q, FakeQuantizer)).scale *= 40
    with pytest.raises(SpecError, match="off the module's own"):
        require_same(module, result, IMAGE)


# --- NVIDIA's, by the names of its state (pytorch_quantization/nn/modules/tensor_quantizer.py) ------------------


class TensorQuantizer(nn.Module):
    """Imitates NVIDIA's class: the same names, and the formula of its ``tensor_quant.py`` written out."""

    def __init__(self, amax: Any, bits: Any = 8, *, unsigned: bool = False, narrow: bool = True, **more: Any) -> None:
        super().__init__()
        self._num_bits, self._unsigned, self._narrow_range = bits, unsigned, narrow
        self._disabled, self._if_quant, self._fake_quant, self._learn_amax = False, True, True, False
        self._scale_amax = None
        if amax is not None:
            self.register_buffer("_amax", torch.as_tensor(amax))
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x: Any) -> Any:
        if self._disabled:
            return x
        largest = 2.0 ** (self._num_bits - 1 + int(self._unsigned)) - 1.0
        smallest = 0.0 if self._unsigned else -largest if self._narrow_range else -largest - 1.0
        scale = largest / self._amax
        return torch.clamp((x * scale).round(), smallest, largest) / scale


class QuantConv2d(nn.Conv2d):
    def __init__(self, conv: Any, source: Any, weight: Any) -> None:
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding)
        self.load_state_dict(conv.state_dict())
        self._input_quantizer, self._weight_quantizer = source, weight

    def forward(self, x: Any) -> Any:
        return self._conv_forward(self._input_quantizer(x), self._weight_quantizer(self.weight), self.bias)


def by_nvidia(source: Any) -> Any:
    plain = network().eval()
    weight = plain[0].weight.detach().abs().amax((1, 2, 3), keepdim=True)
    return nn.Sequential(QuantConv2d(plain[0], source, TensorQuantizer(weight)), *plain[1:]).eval()


@pytest.mark.parametrize(
    ("quantizer", "grid"),
    [
        (lambda: TensorQuantizer(1.27), Grid(0.01, 0, -127, 127)),
        (lambda: TensorQuantizer(1.27, narrow=False), Grid(0.01, 0, -128, 127)),
        (lambda: TensorQuantizer(2.55, unsigned=True), Grid(0.01, 0, 0, 255)),
        (lambda: TensorQuantizer(0.07, bits=4), Grid(0.01, 0, -7, 7)),
    ],
)
def test_a_tensor_quantizer_is_read_by_its_amax(quantizer: Callable[[], Any], grid: Grid) -> None:
    module = by_nvidia(quantizer())
    with torch.no_grad():
        expected = module(IMAGE)
    result, reading = read(module)
    source, weight = reading.quantizers["0._input_quantizer"], reading.quantizers["0._weight_quantizer"]
    assert source.grid is not None
    assert source.grid.scale == pytest.approx(grid.scale, rel=1e-6)
    assert (source.grid.zero_point, source.grid.low, source.grid.high) == (0, grid.low, grid.high)
    assert (source.is_activation, weight.is_activation, weight.axis) == (True, False, 0)
    with torch.no_grad():
        # A product and a quotient by the scale round ties differently: most values are the same.
        assert ((result(IMAGE) - expected).abs() < 1e-5).float().mean() > 0.95


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (lambda: TensorQuantizer(None), r"0\._input_quantizer has no amax.*calibrate"),
        (lambda: TensorQuantizer(1.0, bits=(4, 3)), r"floating-point numbers of \(4, 3\) bits"),
        (lambda: TensorQuantizer(1.0, bits=16), "65535 levels, int8 has 256"),
        (lambda: TensorQuantizer(1.0, _block_sizes={-1: 32}), "has blocks"),
        (lambda: TensorQuantizer(1.0, _dynamic=True), "has no amax"),
        (lambda: TensorQuantizer(1.0, _pre_quant_scale=2.0), "pre_quant_scale"),
        (lambda: TensorQuantizer(torch.full((1, 3, 8, 1), 1.0)), r"scales of shape \(1, 3, 8, 1\)"),
        (lambda: TensorQuantizer(float("nan")), "not positive and finite"),
    ],
)
def test_what_no_int8_engine_can_do_is_refused_by_name(quantizer: Callable[[], Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read(by_nvidia(quantizer()))


def test_what_takes_no_part_is_not_asked() -> None:
    module = by_nvidia(TensorQuantizer(1.0))
    module.spare = TensorQuantizer(None)  # as the deeper stages that SMP keeps
    module.forward = module[:4].forward
    _, reading = read(module)
    assert list(reading.quantizers) == ["0._input_quantizer", "0._weight_quantizer"]


def test_a_disabled_tensor_quantizer_is_none() -> None:
    _, reading = read(by_nvidia(TensorQuantizer(None, _disabled=True)))
    assert list(reading.quantizers) == ["0._weight_quantizer"]


# --- NNCF's, by what its class says ------------------------------------------------------------------------------

BaseQuantizer = type("BaseQuantizer", (nn.Module,), {"__module__": "nncf.torch.quantization.layers"})


class AsymmetricQuantizer(BaseQuantizer):  # type: ignore[misc, valid-type]
    """Imitates ``nncf.torch.quantization.layers.AsymmetricQuantizer`` of 8 bits."""

    def __init__(self, low: float, high: float, enabled: bool = True) -> None:
        super().__init__()
        self.low, self.high, self.enabled = low, high, enabled
        self.level_low, self.level_high, self._scale_shape = 0, 255, (1,)

    def is_enabled_quantization(self) -> bool:
        return self.enabled

    def get_parameters_for_torch_fq(self) -> Any:
        scale = torch.tensor([(self.high - self.low) / 255])
        return 0, 255, scale, torch.round(-self.low / scale).int()

    def forward(self, x: Any) -> Any:
        scale = (self.high - self.low) / 255
        return torch.round((x.clamp(self.low, self.high) - self.low) / scale) * scale + self.low


def test_a_quantizer_of_nncf_is_read_by_its_parameters() -> None:
    module = nn.Sequential(AsymmetricQuantizer(-1.0, 1.55), network()[0], AsymmetricQuantizer(0.0, 1.0, enabled=False))
    result, reading = read(module)
    assert reading.tools == ("NNCF",)
    assert result[0].grid == Grid(float(np.float32(0.01)), 100, 0, 255)
    with torch.no_grad():
        assert torch.allclose(result[0](IMAGE), module[0](IMAGE))
    assert list(reading.quantizers) == ["0"]


def test_activations_rounded_by_channel_are_counted() -> None:
    module = by_nvidia(TensorQuantizer(torch.ones(1, 3, 1, 1)))
    with torch.no_grad():
        expected = module(IMAGE)
    result, reading = read(module)
    assert "left out: 1 round activations by channel" in reading.words
    with torch.no_grad():
        assert ((result(IMAGE) - expected).abs() < 1e-5).float().mean() > 0.95
    _, kept = take_marks(exported(result))
    assert kept.grids == {}


# --- modules that are no fake-quantized ones any more -------------------------------------------------------------


def test_a_module_that_was_never_run_is_refused() -> None:
    with pytest.raises(SpecError, match=r"0\.activation_post_process has seen no data.*run training images"):
        read(prepared(runs=0))


def test_converted_modules_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        conv = torch.ao.nn.quantized.Conv2d(3, 4, 1)
    with pytest.raises(SpecError, match=r"converted to integers \(0 is a quantized Conv2d\).*before convert"):
        read_fake_quantizers(nn.Sequential(conv))
    functional = nn.Sequential(network())
    functional.add = torch.ao.nn.quantized.FloatFunctional()
    assert read_fake_quantizers(functional)[1] is None


def test_one_quantizer_of_two_weights_is_refused() -> None:
    shared = TensorQuantizer(1.0)
    plain = network()
    convs = [QuantConv2d(conv, TensorQuantizer(1.0), shared) for conv in (plain[0], plain[3])]
    result, reading = read_fake_quantizers(nn.Sequential(convs[0], convs[1]))
    assert reading is not None
    with pytest.raises(SpecError, match=r"_weight_quantizer rounds several weights"):
        settled(result.requires_grad_(False), reading, IMAGE)


class Decomposed(nn.Module):
    """What PT2E's ``convert_pt2e`` leaves: Q/DQ operators around activations, integers as weights."""

    def __init__(self) -> None:
        super().__init__()
        import torch.ao.quantization.fx._decomposed  # registers the operators

        self.register_buffer("weight", torch.randint(-127, 128, (4, 3, 1, 1), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(4) * 0.1)
        self.register_buffer("zeros", torch.zeros(4, dtype=torch.int64))

    def forward(self, x: Any) -> Any:
        ops = torch.ops.quantized_decomposed
        q = ops.quantize_per_tensor(x, 0.02, 5, -128, 127, torch.int8)
        x = ops.dequantize_per_tensor(q, 0.02, 5, -128, 127, torch.int8)
        weight = ops.dequantize_per_channel(self.weight, self.scales, self.zeros, 0, -127, 127, torch.int8)
        return nn.functional.conv2d(x, weight)


def test_a_graph_that_pt2e_converted_is_read_by_its_operators() -> None:
    module = torch.export.export(Decomposed(), (IMAGE,)).module()
    with torch.no_grad():
        expected = module(IMAGE)
    result, reading = read(module)
    assert reading.tools == ("PT2E",)
    (quantizer,) = reading.quantizers.values()
    assert quantizer.grid == Grid(float(np.float32(0.02)), 5, -128, 127)
    with torch.no_grad():
        assert torch.allclose(result(IMAGE), expected)
    assert "quantized_decomposed" not in result.code


def test_an_exported_graph_in_training_mode_is_refused() -> None:
    module = torch.export.export(nn.Sequential(network(), nn.Dropout(0.5)).train(), (IMAGE,)).module()
    with pytest.raises(SpecError, match=r"in training mode.*move_exported_model_to_eval"):
        read_fake_quantizers(module)


# --- marks in the graph ------------------------------------------------------------------------------------------


def exported(module: Any) -> Any:
    with mode(module, "marked"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, (IMAGE,), dynamo=True, opset_version=20, verbose=False)
    assert program is not None
    return program.model_proto


def test_marks_leave_the_weights_that_were_rounded_and_say_where_they_stood() -> None:
    result, reading = read(prepared())
    graph, kept = take_marks(exported(result))
    assert kept.lost == 0
    assert [node.op_type for node in graph.graph.node] == ["Conv", "Relu", "Conv"]
    final, marks = drop_marks(graph, kept, reading.tools)
    assert len(final.graph.output) == 1
    grids = [q.grid for q in reading.quantizers.values() if q.is_activation]
    made = [final.graph.input[0].name, *(node.output[0] for node in final.graph.node if node.op_type == "Relu")]
    # The last one rounds the result, whose name the graph keeps.
    assert marks.grids == dict(zip((*made, final.graph.output[0].name), ((grid,) for grid in grids), strict=True))
    # Up to the factors of the normalization, which cancel, the folded weights are the rounded ones.
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in final.graph.initializer}
    first = weights[next(node for node in final.graph.node if node.op_type == "Conv").input[1]]
    rounded = next(q for name, q in reading.quantizers.items() if name.endswith("1.0.weight_fake_quant")).rounded
    assert np.allclose(first, rounded.numpy(), rtol=1e-5, atol=1e-7)


def test_what_rounds_between_a_convolution_and_its_normalization_is_counted() -> None:
    result, reading = read(prepared(fused=False))
    graph, kept = take_marks(exported(result))
    assert [node.op_type for node in graph.graph.node] == ["Conv", "Relu", "Conv"]
    final, marks = drop_marks(graph, kept, reading.tools)
    assert (marks.lost, len(marks.grids)) == (1, 3)
    with mode(result, "weights"), torch.no_grad():
        expected = result(IMAGE).numpy()
    import onnxruntime

    session = onnxruntime.InferenceSession(final.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.allclose(session.run(None, {session.get_inputs()[0].name: IMAGE.numpy()})[0], expected, atol=1e-4)
