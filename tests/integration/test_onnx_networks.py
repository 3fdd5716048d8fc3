"""ONNX files as models: what is read of them, against plain numpy; hostile and unfit ones, refused by name in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from small_graphs import floats, graph, plain_session

from edgeseg.errors import ArtifactError, EdgesegError, SpecError
from edgeseg.spec import ModelRequest

torch = pytest.importorskip("torch")
from edgeseg.convert.fake_quantizers import FakeQuantizer, mode  # noqa: E402
from edgeseg.convert.load import load_model  # noqa: E402
from edgeseg.convert.onnx_network import OnnxNetwork  # noqa: E402

pytestmark = pytest.mark.integration

CONV = "y = Conv<pads=[1,1,1,1]>(image, w)"
SIGNATURE = "(float[N,3,H,W] image) => (float[N,4,H,W] y)"
INT8, UINT8 = np.int8, np.uint8


def network(body: str = CONV, signature: str = SIGNATURE, **weights: Any) -> onnx.ModelProto:
    return graph(signature, body, **{"w": floats(4, 3, 3, 3), **weights})


def written(model: onnx.ModelProto, folder: Path, name: str = "net.onnx") -> Path:
    (folder / name).write_bytes(model.SerializeToString())
    return folder / name


def loaded(model: onnx.ModelProto, folder: Path, **said: Any) -> Any:
    return load_model(ModelRequest(str(written(model, folder)), mean=(0,), std=(1,), **said))


def of_opset(opset: int) -> onnx.ModelProto:
    model = network()
    model.opset_import[0].version = opset
    return model


def with_node(op_type: str, domain: str = "", **attributes: Any) -> onnx.ModelProto:
    model = network("v = Conv<pads=[1,1,1,1]>(image, w) y = Relu(v)")
    model.graph.node[1].CopyFrom(helper.make_node(op_type, ["v"], ["y"], domain=domain, **attributes))
    if domain:
        model.opset_import.append(helper.make_opsetid(domain, 1))
    return model


def with_function() -> onnx.ModelProto:
    model = with_node("Twice", "mine")
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    model.functions.append(helper.make_function("mine", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 20)]))
    return model


def with_branch() -> onnx.ModelProto:
    one = helper.make_graph(
        [helper.make_node("Relu", ["v"], ["z"])], "one", [], [helper.make_empty_tensor_value_info("z")]
    )
    model = network("v = Conv<pads=[1,1,1,1]>(image, w) c = Constant<value = bool[1] {1}>() y = Relu(v)")
    model.graph.node[2].CopyFrom(helper.make_node("If", ["c"], ["y"], then_branch=one, else_branch=one))
    return model


def with_weight(array: NDArray[Any]) -> onnx.ModelProto:
    model = network()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w"))
    return model


def damaged_weight() -> onnx.ModelProto:
    model = network()
    model.graph.initializer[0].raw_data = b"123"
    return model


def huge() -> onnx.ModelProto:
    """Two numbers in the file, and a tensor of a hundred gigabytes when it runs."""
    return network(
        "a = ConstantOfShape(s) v = Conv<pads=[1,1,1,1]>(image, w) m = ReduceMax(a) y = Add(v, m)",
        s=np.array([160_000, 160_000]),
    )


PAIR = "q = QuantizeLinear(image, s, z) x = DequantizeLinear(q, s, z) y = Conv<pads=[1,1,1,1]>(x, w)"
STEP = {"s": np.float32(0.02), "z": np.uint8(3)}


def other_zero_point(tensor: onnx.TensorProto, opset: int) -> onnx.ModelProto:
    model = network(PAIR, **STEP)
    model.opset_import[0].version = opset
    next(weight for weight in model.graph.initializer if weight.name == "z").CopyFrom(tensor)
    return model


def sixteen_bits() -> onnx.ModelProto:
    return other_zero_point(numpy_helper.from_array(np.uint16(3), "z"), 21)


def float8() -> onnx.ModelProto:
    return other_zero_point(helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0.0]), 20)


REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "old": (lambda: of_opset(9), r"net\.onnx has opset 9; export it again with opset_version=20 \(11 at least\)"),
    "QOperator": (
        lambda: network(
            "q = QuantizeLinear(image, s, z) c = ConvInteger<pads=[1,1,1,1]>(q, i, z) y = Cast<to=1>(c)",
            i=np.ones((4, 3, 3, 3), np.int8),
            **STEP,
        ),
        r"computes with integers \('ConvInteger'\).*Q/DQ format",
    ),
    "dynamic": (
        lambda: network(
            "q, s, z = DynamicQuantizeLinear(image) x = DequantizeLinear(q, s, z) y = Conv<pads=[1,1,1,1]>(x, w)"
        ),
        "computes with integers .'DynamicQuantizeLinear'",
    ),
    "integers between": (
        lambda: network(
            "q = QuantizeLinear(image, s, z) m = MaxPool<kernel_shape=[1,1]>(q) x = DequantizeLinear(m, s, z) "
            "y = Conv<pads=[1,1,1,1]>(x, w)",
            **STEP,
        ),
        "computes with integers between Q/DQ pairs",
    ),
    "other steps": (
        lambda: network(PAIR.replace("Linear(q, s, z)", "Linear(q, t, z)"), t=np.float32(0.03), **STEP),
        "is read in other steps than it was rounded to",
    ),
    "16 bits": (
        sixteen_bits,
        "uint16 numbers, which an int8 engine cannot take over; use int8 or uint8",
    ),
    "float8": (float8, "float8e4m3fn numbers"),
    "computed scale": (
        lambda: network(PAIR.replace("q =", "s = ReduceMax<keepdims=0>(image) q ="), z=np.uint8(3)),
        "computes its scale anew for each image",
    ),
    "scale of zero": (lambda: network(PAIR, s=np.float32(0), z=np.uint8(3)), "a scale that is not positive and finite"),
    "domain": (lambda: with_node("Gelu", "com.microsoft"), r"has 'com\.microsoft\.Gelu', no operator of ONNX's own"),
    "function": (with_function, "has 'mine.Twice', no operator of ONNX's own"),
    "branch": (with_branch, "has 'If', and an engine has one way only"),
    "float16": (
        lambda: with_weight(np.ones((4, 3, 3, 3), np.float16)),
        "is of 16 bits; give the float32 file|Type Error",
    ),
    "NaN": (lambda: with_weight(np.full((4, 3, 3, 3), np.nan, np.float32)), "weight 'w' holds NaN or Inf"),
    "damaged": (damaged_weight, "is damaged|not a valid ONNX graph"),
    "huge": (huge, r"makes a tensor of 2\.56e\+10 numbers"),
    "uint8": (
        lambda: network(
            "f = Cast<to=1>(image) y = Conv<pads=[1,1,1,1]>(f, w)", SIGNATURE.replace("float[N,3", "uint8[N,3")
        ),
        "the input 'image' of net.onnx is uint8; give a file that takes normalized float32",
    ),
    "channels last": (
        lambda: network(
            "t = Transpose<perm=[0,3,1,2]>(image) y = Conv<pads=[1,1,1,1]>(t, w)",
            "(float[1,64,64,3] image) => (float[N,4,H,W] y)",
        ),
        r"is \[1, 64, 64, 3\], channels last",
    ),
    "batch": (lambda: network(signature=SIGNATURE.replace("N,3", "4,3")), "is of 4 images; export it for 1"),
    "vectors": (
        lambda: network("y = MatMul(image, v)", "(float[N,3] image) => (float y)", v=floats(3, 4)),
        r"must be \(N, C, H, W\)",
    ),
    "two images": (
        lambda: network(
            "b = Add(image, other) y = Conv<pads=[1,1,1,1]>(b, w)",
            SIGNATURE.replace("image)", "image, float[N,3,H,W] other)"),
        ),
        r"takes 2 inputs \('image', 'other'\)",
    ),
    "two maps": (
        lambda: network(f"{CONV} z = Relu(y)", SIGNATURE.replace(" y)", " y, float[N,4,H,W] z)")),
        r"returns 2 outputs \('y', 'z'\).*onnx\.utils\.extract_model",
    ),
    "threshold": (
        lambda: network(
            "v = Conv<pads=[1,1,1,1]>(image, w) y = Greater(v, t)",
            SIGNATURE.replace("float[N,4", "bool[N,4"),
            t=np.float32(0),
        ),
        "the output 'y' of net.onnx is bool; give a file that returns the float map",
    ),
    "smaller": (
        lambda: network("y = Conv<strides=[2,2],pads=[1,1,1,1]>(image, w)"),
        r"returns \(1, 4, 128, 128\) for 256x256",
    ),
    "other channels": (lambda: network(w=floats(4, 5, 3, 3)), r"does not run|not a valid|cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_is_refused_in_one_line_that_says_why(tmp_path: Path, name: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(EdgesegError, match=words) as caught:
        loaded(make(), tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"encoder": "resnet18"}, "--encoder says how to build a model"),
        ({"model_args": {"a": 1}}, "--model-arg says how"),
        ({"keep_aux": True}, "--keep-aux says how"),
        ({"classes": 7}, "7 classes were asked for, the ONNX file returns 4"),
        ({"in_channels": 1}, "in_channels 1 was given, the ONNX file takes 3"),
        ({"activation": "softmax"}, "activation 'softmax' was given, but the ONNX file returns values"),
    ],
)
def test_options_that_do_not_fit_a_file_are_refused(tmp_path: Path, said: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        loaded(network(), tmp_path, **said)


def test_a_file_and_an_architecture_are_not_both() -> None:
    with pytest.raises(SpecError, match="--arch says how to build a model, and a.onnx is built already"):
        ModelRequest("unet", weights="a.onnx")
    with pytest.raises(SpecError, match="a.onnx holds its weights; leave weights 'b.pth' out"):
        ModelRequest("a.onnx", weights="b.pth")
    assert ModelRequest(Path("a.onnx")) == ModelRequest(weights="a.onnx")  # type: ignore[arg-type]


KERNEL = np.linspace(-1, 1, 4 * 27, dtype=np.float32).reshape(4, 3, 3, 3)


def external(folder: Path, location: str, **entries: int) -> Path:
    model = network(w=KERNEL)
    tensor = model.graph.initializer[0]
    (folder / "w.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return written(model, folder)


def test_weights_beside_the_file_are_read_as_if_they_were_in_it(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    whole = loaded(network(w=KERNEL), tmp_path / "one")
    split = load_model(ModelRequest(str(external(tmp_path, "w.bin", offset=0, length=432)), mean=(0,), std=(1,)))
    assert (split.weights_sha256, split.onnx_bytes) == (whole.weights_sha256, whole.onnx_bytes)


def test_weights_anywhere_else_are_refused(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(432))
    os.mkfifo(inner / "pipe.bin")
    (inner / "link.bin").symlink_to(tmp_path / "secret.bin")
    for location, words in {
        "../secret.bin": "outside the file, in '../secret.bin'",
        str(tmp_path / "secret.bin"): "outside the file",
        "inner/../w.bin": "outside the file",
        "": "outside the file",
        "..": "outside the file",
        "*/_ORT_MEM_ADDR_/*": "outside the file",
        "link.bin": "which is a link; put the file itself there",
        "pipe.bin": "no regular file",
        "gone.bin": "it does not exist",
    }.items():
        with pytest.raises(ArtifactError, match=words) as caught:
            OnnxNetwork(external(inner, location))
        assert "\n" not in str(caught.value)
    for entries in ({"offset": 8}, {"length": 10**12}, {"offset": -1}, {"offset": 10**30}):
        if "offset" in entries and len(entries) == 1:
            entries = {**entries, "length": 432}
        with pytest.raises(ArtifactError, match="which is shorter"):
            OnnxNetwork(external(inner, "w.bin", **entries))


def on(network: OnnxNetwork, image: NDArray[np.float32], wanted: str = "on") -> NDArray[np.float32]:
    with mode(network, wanted):  # type: ignore[arg-type]
        result: NDArray[np.float32] = network(torch.from_numpy(image)).numpy()
    return result


def rounded(x: NDArray[np.float32], scale: float, zero: int, low: int, high: int) -> NDArray[np.float32]:
    """ONNX's QuantizeLinear and DequantizeLinear, in plain numpy."""
    integers = np.clip(np.rint(x / np.float32(scale)) + zero, low, high)
    result: NDArray[np.float32] = ((integers - zero) * np.float32(scale)).astype(np.float32)
    return result


def conv(image: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = torch.nn.functional.conv2d(
        torch.from_numpy(image), torch.from_numpy(weight), padding=1
    ).numpy()
    return result


def test_pairs_are_fake_quantizers(tmp_path: Path) -> None:
    """The file rounds all, what is exported of it weights alone."""
    scales = np.array([0.02, 0.03, 0.025, 0.01], np.float32)
    weight, image = floats(4, 3, 3, 3), floats(2, 3, 8, 8)
    model = network(
        "q = QuantizeLinear(image, s, z) c = Clip(q, l, h) x = DequantizeLinear(c, s, z) "
        "k = QuantizeLinear<axis=0>(w, ws, wz) v = DequantizeLinear<axis=0>(k, ws, wz) y = Conv<pads=[1,1,1,1]>(x, v)",
        w=weight, s=np.float32(0.05), z=np.uint8(60), l=np.uint8(0), h=np.uint8(127), ws=scales, wz=np.zeros(4, INT8),
    )  # fmt: skip
    own = OnnxNetwork(written(model, tmp_path))
    activation, _ = own.quantizers
    assert isinstance(activation, FakeQuantizer)
    assert activation.grid is not None
    assert (activation.grid.zero_point, activation.grid.low, activation.grid.high) == (60, 0, 127)  # torch's 7 bits
    assert [part.is_activation for part in own.graphs.pairs] == [True, False]
    whole = np.concatenate([rounded(weight[i : i + 1], float(s), 0, -128, 127) for i, s in enumerate(scales)])
    np.testing.assert_allclose(on(own, image), conv(rounded(image, 0.05, 60, 0, 127), whole), atol=1e-5)
    np.testing.assert_allclose(on(own, image, "weights"), conv(image, whole), atol=1e-5)
    np.testing.assert_array_equal(on(own, image, "off"), on(own, image, "weights"))


@pytest.mark.parametrize("lowest", [0, 20])
def test_a_relu_that_a_pair_stands_for_is_put_back(tmp_path: Path, lowest: int) -> None:
    """ONNX Runtime's quantizer leaves out a ReLU before integers that have nothing below 0."""
    image = floats(1, 3, 8, 8)
    model = network(
        "v = Conv<pads=[1,1,1,1]>(image, w) q = QuantizeLinear(v, s, z) x = DequantizeLinear(q, s, z) "
        "p = MaxPool<kernel_shape=[1,1]>(x) r = QuantizeLinear(p, s, z) u = DequantizeLinear(r, s, z) "
        "y = Conv<pads=[1,1,1,1]>(u, t)",
        s=np.float32(0.02), z=np.uint8(lowest), t=floats(4, 4, 3, 3),
    )  # fmt: skip
    own = OnnxNetwork(written(model, tmp_path))
    weights = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
    between = conv(image, weights["w"])
    expected = conv(np.maximum(between, 0) if lowest == 0 else between, weights["t"])
    np.testing.assert_allclose(on(own, image, "weights"), expected, atol=1e-4)
    relus = [node.op_type for node in own.graphs.float_model.graph.node].count("Relu")
    assert relus == (lowest == 0)  # once: what follows is not negative by itself


def test_integer_weights_and_biases_are_what_they_stand_for(tmp_path: Path) -> None:
    image, integers = floats(1, 3, 8, 8), np.arange(-54, 54, dtype=INT8).reshape(4, 3, 3, 3)
    scale, bias = np.array([0.01, 0.02, 0.03, 0.04], np.float32), np.array([100, -100, 50, 7], np.int32)
    model = network(
        "v = DequantizeLinear<axis=0>(k, ws, wz) c = DequantizeLinear<axis=0>(b, bs) y = Conv<pads=[1,1,1,1]>(image, v, c)",
        k=integers, ws=scale, wz=np.zeros(4, INT8), b=bias, bs=scale * 0.1,
    )  # fmt: skip
    own = OnnxNetwork(written(model, tmp_path))
    expected = conv(image, integers * scale.reshape(4, 1, 1, 1)) + (bias * scale * 0.1).reshape(1, 4, 1, 1)
    np.testing.assert_allclose(on(own, image, "weights"), expected, rtol=1e-5, atol=1e-5)
    assert len(own.quantizers) == 1  # a bias has the steps of its layer


def test_an_argmax_at_the_end_is_left_out(tmp_path: Path) -> None:
    body = "v = Conv<pads=[1,1,1,1]>(image, w) a = ArgMax<axis=1,keepdims=0>(v) y = Cast<to=2>(a)"
    file = loaded(network(body, SIGNATURE.replace("float[N,4,H,W] y", "uint8[N,H,W] y")), tmp_path)
    assert file.model.classes == 4
    assert any("the ArgMax at the end of net.onnx is left out" in note for note in file.notes)


@pytest.mark.parametrize(
    ("end", "activation"),
    [
        ("y = Softmax<axis=1>(v)", "softmax"),
        ("y = LogSoftmax<axis=1>(v)", "logsoftmax"),
        ("y = Sigmoid(v)", "sigmoid"),
        ("u = Sigmoid(v) q = QuantizeLinear(u, s, z) y = DequantizeLinear(q, s, z)", "sigmoid"),
        ("y = Identity(v)", None),
    ],
)
def test_the_activation_is_read_off_the_last_operator(tmp_path: Path, end: str, activation: str | None) -> None:
    model = network(f"v = Conv<pads=[1,1,1,1]>(image, w) {end}", s=np.float32(1 / 255), z=np.uint8(0))
    assert loaded(model, tmp_path, task="multiclass").model.activation == activation


def test_what_is_computed_from_an_activation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="the ONNX file returns values .*, computed from the result of an activation"):
        loaded(network("v = Conv<pads=[1,1,1,1]>(image, w) u = Sigmoid(v) y = Mul(u, t)", t=np.float32(255)), tmp_path)


def test_sizes_and_batches_are_those_of_the_file(tmp_path: Path) -> None:
    open_file = loaded(network(), tmp_path)
    assert (open_file.stride, open_file.fixed_size, open_file.fixed_batch) == (1, None, None)
    fixed = loaded(network(signature=SIGNATURE.replace("N,3,H,W", "1,3,48,80")), tmp_path)
    assert (fixed.size, fixed.fixed_size, fixed.fixed_batch) == ((48, 80), (48, 80), 1)
    with pytest.raises(SpecError, match="takes 48x80 only, got 64x64; give --size 48x80$"):
        fixed.check_size(64, 64)


def test_the_reference_is_the_file_without_optimization(tmp_path: Path) -> None:
    model, image = network(PAIR, **STEP), floats(2, 3, 16, 16)
    own = OnnxNetwork(written(model, tmp_path))
    (expected,) = plain_session(model).run(None, {"image": image})
    np.testing.assert_array_equal(on(own, image), expected)
    assert own.as_timed().optimized
    assert not own.optimized
