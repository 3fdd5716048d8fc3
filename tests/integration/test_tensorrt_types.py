"""mypy on the backend files with stubs of TensorRT's recorded surfaces; and what such a check finds."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from recorded_tensorrt import RTX, VERSIONS, stubs

pytest.importorskip("mypy", reason="pip install 'edgeseg[dev]'")
pytestmark = pytest.mark.integration

BEGIN = """
from __future__ import annotations
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from tensorrt import Builder, IBuilderConfig, ICudaEngine, IExecutionContext, INetworkDefinition, IProfiler, OnnxParser
    from tensorrt_surface import TensorRT

def use(
    trt: TensorRT,
    builder: Builder,
    config: IBuilderConfig,
    network: INetworkDefinition,
    parser: OnnxParser,
    engine: ICudaEngine,
    context: IExecutionContext,
) -> None:
    """


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mypy")


@pytest.mark.parametrize("version", [*VERSIONS, RTX])
def test_the_backend_files_use_what_the_version_has(cache: Path, version: str) -> None:
    assert stubs.reported(version, stubs.backend_files(version), cache) == stubs.LACKING[version]


def test_every_file_of_the_backends_is_checked() -> None:
    checked = {path.name for version in (*VERSIONS, RTX) for path in stubs.backend_files(version)}
    assert {path.name for path in stubs.BACKEND.glob("*.py")} == checked
    # A parameter that is called trt and is not of the module's type would be checked for nothing.
    for path in sorted(stubs.BACKEND.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.arg) and node.arg == "trt":
                assert node.annotation is not None and ast.unparse(node.annotation) == "TensorRT", path.name


WRONG = {
    "config.set_memory_limit(trt.MemoryPoolType.WORKSPACE, 1)": 'has no attribute "set_memory_limit"',
    "config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size=1)": 'Unexpected keyword argument "size"',
    "config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)": 'Missing positional argument "pool_size"',
    "config.set_memory_pool_limit(1, 1)": 'Argument 1 to "set_memory_pool_limit" of "IBuilderConfig" has incompatible',
    "config.set_flag(trt.BuilderFlag.FP61)": '"type[BuilderFlag]" has no attribute "FP61"',
    "builder.create_network(0, 1)": 'Too many arguments for "create_network"',
    "builder.build_serialized_network(config, network)": "No overload variant",
    "builder.build_serialized_network(network, config).size": '"IHostMemory" has no attribute "size"',
    "trt.Bulider": '"TensorRT" has no attribute "Bulider"',
    "trt.OnnxParser(network)": 'Missing positional argument "logger"',
    "parser.get_error(0).descr()": '"ParserError" has no attribute "descr"',
    "parser.parse('model.onnx')": 'Argument 1 to "parse" of "OnnxParser" has incompatible type "str"',
    "engine.num_io_tensor": '"ICudaEngine" has no attribute "num_io_tensor"',
    "engine.get_binding_index('image')": '"ICudaEngine" has no attribute "get_binding_index"',
    "engine.num_layers = 1": 'Property "num_layers" defined in "ICudaEngine" is read-only',
    "config.builder_optimisation_level = 1": '"IBuilderConfig" has no attribute "builder_optimisation_level"',
    "context.set_tensor_address('image', None)": 'Argument 2 to "set_tensor_address" of "IExecutionContext" has incompatible',
}
RIGHT = """config.set_memory_pool_limit(pool=trt.MemoryPoolType.WORKSPACE, pool_size=1 << 20)
    config.builder_optimization_level = 3
    bytes(builder.build_serialized_network(network, config))
    trt.OnnxParser(network, trt.Logger(trt.Logger.WARNING)).parse(b"")
"""


PROFILER = "pass\n\nclass P(IProfiler):\n    def {} -> None: ...\n\nP()"
METHODS = {
    "report_layer_times(self, layer_name: str, ms: float)": "Cannot instantiate abstract class",
    "report_layer_time(self, layer_name: str)": 'Signature of "report_layer_time" incompatible with supertype',
    "report_layer_time(self, layer_name: int, ms: float)": 'Argument 1 of "report_layer_time" is incompatible',
}
WRONG |= {PROFILER.format(method): message for method, message in METHODS.items()}
RIGHT += "    " + PROFILER.format("report_layer_time(self, layer_name: str, ms: float)")


def check(folder: Path, cache: Path, *lines: str, version: str = "10.16.1.11") -> set[str]:
    """What is reported of files ``0.py``, ``1.py``, ... that each do one of these."""
    files = []
    for number, line in enumerate(lines):
        files.append(folder / f"snippet_{number}.py")
        files[-1].write_text(BEGIN + line + "\n")
    return stubs.reported(version, files, cache)


def test_what_is_wrong_is_reported_and_nothing_else(tmp_path: Path, cache: Path) -> None:
    dropped = "config.set_flag(trt.BuilderFlag.FP16)"
    complaints = check(tmp_path, cache, *WRONG, RIGHT, dropped)
    for number, (line, message) in enumerate(WRONG.items()):
        mine = [text for text in complaints if text.startswith(f"snippet_{number}.py")]
        assert any(message in text for text in mine), (line, mine)
    assert not [text for text in complaints if int(text.split(".py")[0].removeprefix("snippet_")) >= len(WRONG)]
    (complaint,) = check(tmp_path, cache, dropped, version="11.4.0.106")
    assert complaint == 'snippet_0.py: "type[BuilderFlag]" has no attribute "FP16"'
