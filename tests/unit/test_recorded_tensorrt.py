"""The recorded TensorRT modules raise where the version lacks something: a recorder that cannot fail proves nothing."""

from __future__ import annotations

from typing import Any

import pytest
from recorded_tensorrt import VERSIONS, Recorder
from recorded_tensorrt.graphs import small_model

from edgeseg.backends.tensorrt.opset17 import for_tensorrt_8


@pytest.mark.parametrize("version", VERSIONS)
def test_modules_say_their_version(version: str) -> None:
    assert Recorder(version).module.__version__ == version


def test_a_flag_that_11_dropped_raises() -> None:
    assert Recorder("10.16.1.11").module.BuilderFlag.FP16.name == "FP16"
    with pytest.raises(AttributeError, match=r"tensorrt 11\.4\.0\.106 has no BuilderFlag\.FP16"):
        Recorder("11.4.0.106").module.BuilderFlag.FP16  # noqa: B018


def test_a_class_the_version_lacks_raises() -> None:
    assert not hasattr(Recorder("8.6.1").module, "IProgressMonitor")
    with pytest.raises(AttributeError, match=r"tensorrt 8\.6\.1 has no IProgressMonitor"):
        Recorder("8.6.1").module.IProgressMonitor  # noqa: B018
    with pytest.raises(AttributeError, match="has no IInt8EntropyCalibrator2"):
        Recorder("11.4.0.106").module.IInt8EntropyCalibrator2  # noqa: B018


@pytest.mark.parametrize(
    ("version", "name", "error"),
    [
        ("8.6.1", "progress_monitor", True),
        ("10.3.0", "progress_monitor", False),
        ("11.4.0.106", "int8_calibrator", True),
    ],
)
def test_assigning_a_property_the_version_lacks_raises(version: str, name: str, error: bool) -> None:
    trt = Recorder(version).module
    config = trt.Builder(trt.Logger()).create_builder_config()
    if error:
        with pytest.raises(AttributeError, match=f"has no IBuilderConfig.{name}"):
            setattr(config, name, None)
    else:
        setattr(config, name, None)


def test_arity_keywords_and_types_are_checked() -> None:
    trt = Recorder("10.3.0").module
    builder = trt.Builder(trt.Logger())
    config = builder.create_builder_config()
    for wrong in (
        lambda: builder.create_network(0, 1),
        lambda: builder.create_network(flag=0),
        lambda: config.set_flag(0),
        lambda: config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE),
        lambda: builder.build_serialized_network(config, config),
        lambda: trt.Runtime(),
    ):
        with pytest.raises(TypeError, match=r"tensorrt 10\.3\.0"):
            wrong()


def test_read_only_and_abstract() -> None:
    trt = Recorder("10.3.0").module
    builder = trt.Builder(trt.Logger())
    with pytest.raises(AttributeError, match="cannot be set"):
        builder.num_DLA_cores = 1
    with pytest.raises(TypeError, match="No constructor"):
        trt.ICudaEngine()


def test_enums_convert_but_do_not_equal_integers() -> None:
    trt = Recorder("10.3.0").module
    assert int(trt.BuilderFlag.FP16) == trt.BuilderFlag.FP16.value
    assert trt.BuilderFlag.FP16.value != trt.BuilderFlag.FP16


def test_interfaces_can_be_subclassed_and_want_their_constructor_called() -> None:
    trt = Recorder("8.6.1").module

    class Good(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.said: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.said.append(message)

    class Bad(trt.IInt8EntropyCalibrator2):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.batches = 0

    trt.Builder(Good())
    with pytest.raises(TypeError, match="must be called when overriding"):
        Bad()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_plan_goes_round(version: str) -> None:
    recorder = Recorder(version)
    trt = recorder.module
    logger = trt.Logger()
    builder = trt.Builder(logger)
    flags = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << int(flags.EXPLICIT_BATCH) if version.startswith("8") else 0)
    model = small_model()
    assert trt.OnnxParser(network, logger).parse(
        (for_tensorrt_8(model).model if version.startswith("8") else model).SerializeToString()
    )
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    engine = trt.Runtime(logger).deserialize_cuda_engine(bytes(plan))
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    assert names == ["image", "mask"]
    assert [engine.get_tensor_mode(n) for n in names] == [trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT]
    context = engine.create_execution_context()
    assert context.set_input_shape("image", (1, 32, 32, 3))
    assert not context.set_input_shape("image", (2, 32, 32, 3))
    assert context.get_tensor_shape("mask") == (1, 32, 32)
    assert recorder.names.index("OnnxParser.parse") < recorder.names.index("Builder.build_serialized_network")
    assert trt.Runtime(logger).deserialize_cuda_engine(b"something else") is None
