"""What TensorRT and TensorRT-RTX have in common: import the module, parse a graph, deserialize and refit an engine."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgeseg.backends.self_contained import require_self_contained
from edgeseg.backends.tensorrt.log import LogCapture
from edgeseg.errors import ArtifactError, BuildError, DeviceError, MissingDependencyError

if TYPE_CHECKING:
    from tensorrt import Builder, ICudaEngine, INetworkDefinition
    from tensorrt_surface import TensorRT

    from edgeseg.backends.tensorrt.graph import ParsedGraph

MIB = 1 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class Product:
    """One of the two products.

    Attributes:
        title: as people write it.
        module: what Python imports.
        extra: of edgeseg, that installs it.
        purpose: what it is needed for.
    """

    title: str
    module: str
    extra: str
    purpose: str

    def load(self) -> Any:
        """The module. Raises ``MissingDependencyError``; ``BuildError`` when it is there and does not load."""
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as exc:
            raise MissingDependencyError(self.module, self.extra, self.purpose) from exc
        except (ImportError, OSError) as exc:
            raise BuildError(
                f"{self.module} is installed but does not load: {exc}; install the CUDA libraries it names"
            ) from exc
        if not hasattr(module, "Builder"):
            # A folder of that name is an empty package to Python: type stubs, or what a removed wheel left behind.
            raise MissingDependencyError(self.module, self.extra, self.purpose)
        return module

    def version(self, trt: TensorRT) -> str:
        """``TensorRT 10.3.0``."""
        return f"{self.title} {trt.__version__}"

    def made(self, trt: TensorRT, kind: Callable[[Any], T], logger: Any, log: LogCapture) -> T:
        """A ``Builder`` or ``Runtime``. Raises ``DeviceError`` where the driver is none this TensorRT can use."""
        try:
            return kind(logger)
        except TypeError as exc:
            if "nullptr" not in str(exc):
                raise
            raise DeviceError(
                f"{self.version(trt)} cannot use the GPU of this machine: {log.first_error()}; it needs an NVIDIA driver "
                "for the CUDA it was built with (nvidia-smi shows both)"
            ) from exc

    def parse(
        self,
        trt: TensorRT,
        builder: Builder,
        flags: int,
        logger: Any,
        log: LogCapture,
        parsed: ParsedGraph,
    ) -> INetworkDefinition:
        """Parse a graph written as this version takes it. Raises ``BuildError`` naming node and module."""
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, logger)
        if parser.parse(parsed.model.SerializeToString()):
            return network
        if not parser.num_errors:
            raise self.refused(trt, "parse", log, parsed)
        error = parser.get_error(0)
        node = error.node_name() if hasattr(error, "node_name") else ""
        index = int(error.node())
        if not node and 0 <= index < len(parsed.nodes):
            node = parsed.nodes[index]
        raise self._error(trt, "parse", parsed, f"{' '.join(str(error.desc()).split())}{parsed.where(node)}")

    def refused(self, trt: TensorRT, what: str, log: LogCapture, parsed: ParsedGraph, advice: str = "") -> BuildError:
        """The one error of a step that failed: the first line of the log that names a node, or else the first error.

        Args:
            trt: the module.
            what: the step, ``build`` or ``parse``.
            log: of this build.
            parsed: the graph.
            advice: what to do, where that is known.
        """
        blaming = next((text for text in log.errors if parsed.blame(text)), None)
        text = log.first_error() if blaming is None else log.one_line(blaming)
        return self._error(trt, what, parsed, f"{text}{parsed.blame(blaming or '')}{advice}")

    def _error(self, trt: TensorRT, what: str, parsed: ParsedGraph, text: str) -> BuildError:
        return BuildError(f"{self.version(trt)} cannot {what} {parsed.path.name}: {text}")

    def deserialize(
        self, trt: TensorRT, logger: Any, log: LogCapture, plan: bytes, options: Mapping[str, Any], path: Path
    ) -> ICudaEngine:
        """Make an engine of a plan whose hash was checked. Raises ``ArtifactError``."""
        runtime = self.made(trt, trt.Runtime, logger, log)
        if options.get("version_compatible"):
            # Such a plan carries host code of its TensorRT; its hash is the manifest's, so it is ours.
            runtime.engine_host_code_allowed = True
        if options.get("dla_core") is not None:
            runtime.DLA_core = int(options["dla_core"])
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise ArtifactError(f"{self.version(trt)} cannot load {path}: {log.first_error()}; compile it again")
        return engine

    def refit(self, trt: TensorRT, logger: Any, log: LogCapture, engine: ICudaEngine, graph: Path) -> None:
        """Put the weights of the portable graph into a stripped engine. Raises ``ArtifactError``."""
        require_self_contained(graph)
        refitter = trt.Refitter(engine, logger)
        parser = trt.OnnxParserRefitter(refitter, logger)
        if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
            raise ArtifactError(
                f"{self.version(trt)} cannot put the weights of {graph} back: {log.first_error()}; compile it again"
            )


TENSORRT = Product("TensorRT", "tensorrt", "tensorrt", "build and run TensorRT engines")
TENSORRT_RTX = Product("TensorRT-RTX", "tensorrt_rtx", "tensorrt-rtx", "build TensorRT-RTX engines")
