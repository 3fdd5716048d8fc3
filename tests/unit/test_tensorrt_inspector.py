"""What TensorRT's engine inspector says, in the forms of 8.6, 10 and 11, and what edgeseg reads from it.

The texts are made up after what engines of those versions print: names of fields, of formats and of kernels are TensorRT's.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgeseg.backends.tensorrt.inspector import (
    EngineLayer,
    executed_dtypes,
    proven_precision,
    read_layers,
    require_delivered,
    time_share,
)
from edgeseg.errors import BuildError

INT8_32 = "Thirty-two wide channel vectorized row major Int8 format"
NODES = (
    "encoder.conv1/Conv",
    "encoder.conv1/Relu",
    "encoder.layer1.conv2/Conv",
    "encoder.layer1/Add",
    "encoder.layer1/Relu",
    "decoder.attention/MatMul",
    "decoder.attention/Softmax",
    "decoder.head/Conv",
)


def tensor(name: str, text: str, new: bool = False) -> dict[str, Any]:
    said: dict[str, Any] = {"Name": name, "Location": "Device", "Dimensions": [1, 64, 56, 56]}
    if new:
        layout = "Channel major format where channel % 32 == 0 (kCHW32)" if text == "Int8" else "Row major (kLINEAR)"
        return {**said, "Format": layout, "DataType": text}
    return {**said, "Format/Datatype": text}


def onnx_layers(*names: str, separator: str = "\x1e") -> str:
    return separator.join(f"[ONNX Layer: {name}]" for name in names)


def layers_8_6() -> list[dict[str, Any]]:
    """Weights are named first in a fused layer's name; one block is Myelin's, with a name of two nodes."""
    return [
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to encoder.conv1.weight + encoder.conv1/Conv",
            "LayerType": "Reformat",
            "Inputs": [tensor("x", "Row major linear FP32")],
            "Outputs": [tensor("x'", "Four wide channel vectorized row major Int8 format")],
            "ParameterType": "Reformat",
            "Origin": "REFORMAT",
            "TacticValue": "0x00000000000003ea",
        },
        {
            "Name": "encoder.conv1.weight + encoder.conv1/Q + encoder.conv1/Conv + encoder.conv1/Relu",
            "LayerType": "CaskConvolution",
            "Inputs": [tensor("x'", "Four wide channel vectorized row major Int8 format")],
            "Outputs": [tensor("y", INT8_32)],
            "ParameterType": "Convolution",
            "Weights": {"Type": "Int8", "Count": 9408},
            "Bias": {"Type": "Float", "Count": 64},
            "TacticName": "ampere_fp32_icudnn_int8x4_128x64_relu_medium_nn_v1",
            "Metadata": onnx_layers("encoder.conv1/Q", "encoder.conv1/Conv", "encoder.conv1/Relu"),
        },
        {
            "Name": "encoder.layer1.conv2.weight + encoder.layer1.conv2/Conv + encoder.layer1/Add + encoder.layer1/Relu",
            "LayerType": "CaskConvolution",
            "Inputs": [
                tensor("y", INT8_32),
                tensor("residual", "Sixteen wide channel vectorized row major FP16 format"),
            ],
            "Outputs": [tensor("z", "Thirty-two wide channel vectorized row major FP16 format")],
            "Weights": {"Type": "Int8", "Count": 36864},
            "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8f16_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_t1r3s3",
            "Metadata": onnx_layers("encoder.layer1.conv2/Conv", "encoder.layer1/Add", "encoder.layer1/Relu"),
        },
        {
            "Name": "{ForeignNode[decoder.attention/MatMul...decoder.attention/Softmax]}",
            "LayerType": "Myelin",
            "Inputs": [tensor("z", "Row major linear FP16 format")],
            "Outputs": [tensor("a", "Row major linear FP16 format")],
            "TacticValue": "0x0000000000000000",
        },
        {
            "Name": "decoder.head.weight + decoder.head/Conv",
            "LayerType": "CaskConvolution",
            "Inputs": [tensor("a", "Channel major FP32 format where channel % 4 == 0")],
            "Outputs": [tensor("mask", "Row major linear FP32")],
            "Weights": {"Type": "Float", "Count": 9},
            "TacticName": "sm80_xmma_fprop_implicit_gemm_f32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x64x16",
            "Metadata": onnx_layers("decoder.head/Conv"),
        },
    ]


def layers_10(dynamic: bool = False) -> list[dict[str, Any]]:
    """Myelin's kernels are layers of their own, with short names of types; some only move what a node needs."""
    unknown = "N/A due to dynamic shapes"
    return [
        {
            "Name": "__myl_MoveConc_myl0_0",
            "LayerType": "kgen",
            "Inputs": [tensor("x", "UInt8")],
            "Outputs": [tensor("x'", "Int8")],
            "TacticName": "__myl_MoveConc_0x5b",
            "StreamId": 0,
            "Metadata": onnx_layers("encoder.conv1/Conv", "decoder.head/Conv", separator="\x1f"),
        },
        *(
            {**layer, "Inputs": [tensor("x", unknown)] if dynamic else layer["Inputs"], "StreamId": 0}
            for layer in layers_8_6()[1:3]
        ),
        {
            "Name": "_gemm_mha_v2_myl0_4",
            "LayerType": "kgen",
            "Inputs": [tensor("z", "Half"), tensor("scale", "Float")],
            "Outputs": [tensor("a", "Half")],
            "TacticName": "_gemm_mha_v2_0x1c",
            "StreamId": 0,
            "Metadata": onnx_layers("decoder.attention/MatMul", "decoder.attention/Softmax", separator="\x1f"),
        },
        {
            "Name": "decoder.head/Conv_myl0_6",
            "LayerType": "conv",
            "Inputs": [tensor("a", "Float")],
            "Outputs": [tensor("mask", "Float")],
            "TacticName": "sm80_xmma_fprop_implicit_gemm_f32f32_f32f32_f32_nhwckrsc_nhwc_tilesize128x64x16",
            "StreamId": 0,
            "Metadata": onnx_layers("decoder.head/Conv"),
        },
        {"Name": "wait_for_stream", "LayerType": "wait", "Inputs": [], "Outputs": [], "StreamId": 0, "Metadata": ""},
    ]


def layers_11() -> list[dict[str, Any]]:
    words = {"int8": "Int8", "fp16": "Half", "fp32": "Float"}
    conv1, conv2, mha, head = (dict(layer) for layer in layers_10()[1:5])
    for layer, word in ((conv1, "int8"), (conv2, "int8"), (mha, "fp16"), (head, "fp32")):
        layer["Inputs"] = [tensor("x", words[word], new=True)]
        layer["Outputs"] = [tensor("y", words[word], new=True)]
    return [conv1, conv2, mha, head]


def text(layers: list[dict[str, Any]], new: bool = False) -> str:
    if new:
        io = {"Name": "image", "IOMode": "Input", "DataType": "UInt8", "Dimensions": [1, 56, 56, 3]}
        return json.dumps({"Layers": layers, "I/O Tensors": [io]})
    return json.dumps({"Layers": layers, "Bindings": ["image", "mask"]})


WANTED = {
    **dict.fromkeys(NODES[:5], "int8"),
    "decoder.attention/MatMul": "fp16",
    "decoder.attention/Softmax": "fp16",
    "decoder.head/Conv": "fp32",
}


@pytest.mark.parametrize(
    "information",
    [
        pytest.param(text(layers_8_6()), id="8.6"),
        pytest.param(text(layers_10()), id="10"),
        pytest.param(text(layers_10(dynamic=True)), id="10-dynamic"),
        pytest.param(text(layers_11(), new=True), id="11"),
    ],
)
def test_each_node_is_found_in_the_dtype_it_ran_in(information: str) -> None:
    layers = read_layers(information)
    assert executed_dtypes(layers, NODES) == WANTED
    macs = {"encoder.conv1/Conv": 10, "encoder.layer1.conv2/Conv": 60, "decoder.attention/MatMul": 20, NODES[-1]: 10}
    report = proven_precision(layers, "int8", macs, NODES)
    assert report.mac_share == {"int8": 0.7, "fp16": 0.2, "fp32": 0.1}
    assert report.float_layers == {"decoder.attention/MatMul": "runs in fp16", "decoder.head/Conv": "runs in fp32"}


def dtype(**fields: Any) -> str:
    (layer,) = read_layers(json.dumps({"Layers": [{"Name": "n", **fields}]}))
    return layer.dtype


@pytest.mark.parametrize(
    ("tactic", "wanted"),
    [
        ("sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32", "int8"),
        ("sm80_xmma_fprop_implicit_gemm_interleaved_i8f32_i8i32_f32_nchw", "int8"),
        ("turing_int8_i8816cudnn_int8_256x128_ldg16_relu_singleBuffer_medium_nt_v1", "int8"),
        ("sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x32", "fp16"),
        ("sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize64x64x64", "fp16"),
        ("turing_h1688cudnn_128x128_ldg8_relu_exp_small_nhwc_tn_v1", "fp16"),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "bf16"),
        ("sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize32x32x64", "fp32"),
        ("volta_scudnn_128x64_relu_xregs_large_nn_v1", "fp32"),
    ],
)
def test_the_kernels_name_says_what_a_convolution_multiplies_in(tactic: str, wanted: str) -> None:
    unknown = [tensor("x", "N/A due to dynamic shapes")]
    assert dtype(LayerType="CaskConvolution", Inputs=unknown, TacticName=tactic) == wanted
    # Whatever goes in: it may be converted on the way.
    assert dtype(LayerType="CaskGemmConvolution", Inputs=[tensor("x", "Int8")], TacticName=tactic) == wanted


@pytest.mark.parametrize(
    ("form", "weights", "wanted"),
    [(INT8_32, "Float", "fp32"), ("Row major linear FP32", "Int8", "fp32"), (INT8_32, "Half", "fp16")],
)
def test_integers_in_and_float_weights_are_float_work(form: str, weights: str, wanted: str) -> None:
    fields: dict[str, Any] = {"LayerType": "CaskConvolution", "Inputs": [tensor("x", form)]}
    assert dtype(**fields, Weights={"Type": weights, "Count": 9}) == wanted
    assert dtype(**fields, Weights={"Type": "Int8", "Count": 9}) == ("int8" if form == INT8_32 else "fp32")


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Row major linear FP32", "fp32"),
        ("Row major linear UInt8 format", "uint8"),
        ("Row major linear BFloat16 format", "bf16"),
        ("Row major linear Int32", "int32"),
        ("Half", "fp16"),
        ("Float", "fp32"),
        ("Int64", "int64"),
        ("Unknown format", "unknown"),
        ("N/A due to dynamic shapes", "unknown"),
    ],
)
def test_formats(form: str, wanted: str) -> None:
    assert dtype(LayerType="PointWiseV2", Inputs=[tensor("x", form)]) == wanted
    # The image is uint8; that is no int8 work.
    assert dtype(LayerType="kgen", Inputs=[tensor("x", form, new=True)]) == wanted


def test_two_layers_of_one_node_that_do_not_agree_prove_the_wider() -> None:
    def gemm(name: str, form: str) -> dict[str, Any]:
        return {"Name": name, "LayerType": "gemm", "Inputs": [tensor("x", form)], "Metadata": onnx_layers(NODES[0])}

    layers = read_layers(text([gemm("a", "Int8"), gemm("b", "Half")]))
    assert executed_dtypes(layers, NODES) == {NODES[0]: "fp16"}


def test_another_precision_is_named_with_its_layers() -> None:
    report = proven_precision(read_layers(text(layers_10())), "int8", {NODES[0]: 10, NODES[-1]: 90}, NODES)
    with pytest.raises(
        BuildError, match=r"int8 was asked for, but TensorRT 10.3.0 runs 10.0% .*decoder.head/Conv runs"
    ):
        require_delivered(report, {"int8": 1.0}, "10.3.0")
    require_delivered(report, {"int8": 0.1}, "10.3.0")


def test_share_of_time() -> None:
    layers = [
        EngineLayer("conv", "CaskConvolution", "int8", ()),
        EngineLayer("twice", "kgen", "fp16", ()),
        EngineLayer("twice", "kgen", "fp16", ()),
        EngineLayer("both", "kgen", "fp16", ()),
        EngineLayer("both", "kgen", "fp32", ()),
    ]
    times = [("conv", 6.0), ("twice", 1.0), ("twice", 1.0), ("both", 1.0), ("[trainStation1]", 1.0)]
    assert time_share(layers, times) == {"fp16": 0.2, "int8": 0.6, "unknown": 0.2}
    assert time_share(layers, []) is None and time_share(layers, [("conv", 0.0)]) is None


def test_names_of_layers_only_prove_nothing() -> None:
    with pytest.raises(BuildError, match="cannot be proven"):
        read_layers(json.dumps({"Layers": ["a", "b"]}))
    with pytest.raises(BuildError, match="gave no list of layers"):
        read_layers("no JSON")
