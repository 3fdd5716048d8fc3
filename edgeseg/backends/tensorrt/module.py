"""What TensorRT and TensorRT-RTX have in common: import the module, parse a graph, deserialize and refit an engine."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgeseg.backends.self_contained import require_self_contained
from edgeseg.backends.tensorrt.log import LogCapture, capture
from edgeseg.backends.tensorrt.options import BuilderOptions, Shape
from edgeseg.errors import ArtifactError, BuildError, DeviceError, MissingDependencyError, SpecError, one_line

if TYPE_CHECKING:
    from tensorrt import Builder, IBuilderConfig, ICudaEngine, INetworkDefinition, IOptimizationProfile
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

    @contextmanager
    def heard(self, trt: TensorRT) -> Iterator[Library]:
        """Yield what is done with the module, and what it says while the block runs."""
        with capture(trt) as (logger, log):
            yield Library(f"{self.title} {trt.__version__}", trt, logger, log)


@dataclass(frozen=True)
class Library:
    """A module in use.

    Attributes:
        name: ``TensorRT 10.3.0``.
        trt: the module.
        logger: what its objects are made with.
        log: what it has said so far.
    """

    name: str
    trt: TensorRT
    logger: Any
    log: LogCapture

    def made(self, kind: Callable[[Any], T]) -> T:
        """A ``Builder`` or ``Runtime``. Raises ``DeviceError`` where the driver is none this TensorRT can use."""
        try:
            return kind(self.logger)
        except TypeError as exc:
            if "nullptr" not in str(exc):
                raise
            raise DeviceError(
                f"{self.name} cannot use the GPU of this machine: {self.log.first_error()}; it needs an NVIDIA driver "
                "for the CUDA it was built with (nvidia-smi shows both)"
            ) from exc

    def parse(self, builder: Builder, flags: int, parsed: ParsedGraph) -> INetworkDefinition:
        """Parse a graph written as this version takes it. Raises ``BuildError`` naming node and module."""
        network = builder.create_network(flags)
        parser = self.trt.OnnxParser(network, self.logger)
        if parser.parse(parsed.model.SerializeToString()):
            return network
        if not parser.num_errors:
            raise self.refused("parse", parsed)
        error = parser.get_error(0)
        node = error.node_name() if hasattr(error, "node_name") else ""
        index = int(error.node())
        if not node and 0 <= index < len(parsed.nodes):
            node = parsed.nodes[index]
        raise self._error("parse", parsed, f"{one_line(str(error.desc()))}{parsed.where(node)}")

    def refused(self, what: str, parsed: ParsedGraph, advice: str = "") -> BuildError:
        """The one error of a step that failed: the first line of the log that names a node, or else the first error.

        Args:
            what: the step, ``build`` or ``parse``.
            parsed: the graph.
            advice: what to do, where that is known.
        """
        blaming = next((text for text in self.log.errors if parsed.blame(text)), None)
        text = self.log.first_error() if blaming is None else one_line(blaming)
        return self._error(what, parsed, f"{text}{parsed.blame(blaming or '')}{advice}")

    def _error(self, what: str, parsed: ParsedGraph, text: str) -> BuildError:
        return BuildError(f"{self.name} cannot {what} {parsed.path.name}: {text}")

    def member(self, enumeration: str, name: str) -> Any:
        """Of one of the module's enumerations. Raises ``SpecError`` where this version's has none of that name."""
        kind = getattr(self.trt, enumeration)
        if not hasattr(kind, name):
            raise SpecError(f"{self.name} has no {enumeration} {name} (it has {', '.join(kind.__members__)})")
        return getattr(kind, name)

    def configure(self, config: IBuilderConfig, options: BuilderOptions) -> None:
        """Set what can be asked of both products, shapes apart. Raises ``SpecError`` for what this version has not."""
        if options.workspace_mb is not None:
            config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, options.workspace_mb * MIB)
        if not options.tf32:
            config.clear_flag(self.trt.BuilderFlag.TF32)
        for wanted, flag in ((options.strip_weights, "STRIP_PLAN"), (options.refit, "REFIT")):
            if wanted:
                config.set_flag(self.member("BuilderFlag", flag))

    def add_profile(
        self, builder: Builder, config: IBuilderConfig, shapes: tuple[Shape, Shape, Shape]
    ) -> IOptimizationProfile:
        """Let images have these shapes, from the smallest to the largest. Raises ``BuildError``."""
        profile = builder.create_optimization_profile()
        profile.set_shape("image", *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(
                f"{self.name} refuses shapes {shapes}: {self.log.first_error()}; give others by min_size and max_size"
            )
        return profile

    def deserialize(
        self, plan: bytes, options: Mapping[str, Any], path: Path, graph: Path | None = None
    ) -> ICudaEngine:
        """Make an engine of a plan whose hash was checked; one without weights gets those of ``graph``, the portable one.

        Raises:
            ArtifactError: the plan cannot be loaded, or the weights not be put back.
        """
        runtime = self.made(self.trt.Runtime)
        if options.get("version_compatible"):
            # Such a plan carries host code of its TensorRT; its hash is the manifest's, so it is ours.
            runtime.engine_host_code_allowed = True
        if options.get("dla_core") is not None:
            runtime.DLA_core = int(options["dla_core"])
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise ArtifactError(f"{self.name} cannot load {path}: {self.log.first_error()}; compile it again")
        if graph is not None and options.get("strip_weights"):
            self.refit(engine, graph)
        return engine

    def refit(self, engine: ICudaEngine, graph: Path) -> None:
        """Put the weights of the portable graph into a stripped engine. Raises ``ArtifactError``."""
        require_self_contained(graph)
        refitter = self.trt.Refitter(engine, self.logger)
        parser = self.trt.OnnxParserRefitter(refitter, self.logger)
        if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
            raise ArtifactError(
                f"{self.name} cannot put the weights of {graph} back: {self.log.first_error()}; compile it again"
            )


TENSORRT = Product("TensorRT", "tensorrt", "tensorrt", "build and run TensorRT engines")
TENSORRT_RTX = Product("TensorRT-RTX", "tensorrt_rtx", "tensorrt-rtx", "build TensorRT-RTX engines")
