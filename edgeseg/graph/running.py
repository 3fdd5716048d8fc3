"""A graph in memory, run in ONNX Runtime on the CPU: for its values, not for its speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgeseg.errors import EdgesegError, first_line, imported
from edgeseg.graph.proto import copied, refill
from edgeseg.machine.cpu import this_cpu


class GraphSession:
    """A thread per core, none of which spins: what is done with the values takes the same cores.

    Args:
        model: the graph.
        what: what it is, for messages.
        error: what is raised when ONNX Runtime refuses it, or fails.
        names: float tensors to return in place of its outputs.
        optimized: let ONNX Runtime fuse; otherwise every operator runs as written.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        what: str,
        error: type[EdgesegError],
        *,
        names: Sequence[str] | None = None,
        optimized: bool = False,
    ) -> None:
        ort = imported("onnxruntime", "onnxruntime", "run a graph on this CPU")
        self._what, self._error = what, error
        options = ort.SessionOptions()
        options.intra_op_num_threads = this_cpu().cores
        options.log_severity_level = 4
        if not optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if names is not None:
            model = copied(model)
            refill(model.graph.output, (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names))
        try:
            self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # pybind maps ORT's status codes to classes that share no base but Exception
            raise error(f"ONNX Runtime cannot load {what}: {first_line(exc)}") from exc
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]

    def run(self, values: Mapping[str, NDArray[Any]] | NDArray[Any], of: str = "") -> dict[str, NDArray[Any]]:
        """Outputs by name.

        Args:
            values: the inputs by name, others among them; of a graph with one input the array itself.
            of: what the values are, for messages.
        """
        given = values if isinstance(values, Mapping) else {self._inputs[0]: values}
        fed = {name: given[name] for name in self._inputs}
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, fed), strict=True))
        except Exception as exc:  # as above
            shapes = ", ".join(str(array.shape) for array in fed.values())
            raise self._error(
                f"ONNX Runtime failed on {of or self._what} of shape {shapes}: {first_line(exc)}"
            ) from exc
