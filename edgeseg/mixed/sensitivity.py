"""What INT8 of each module alone loses: all other modules in float, module by module, on the same images.

The float graph runs once for each image; see :mod:`edgeseg.quantize.suffix`. What was judged is kept in the cache, by module
and by stretch of images, so a run that was ended goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import onnx
import onnx_ir as ir

from edgeseg.closing import Closing
from edgeseg.errors import QuantizationError
from edgeseg.evaluate.accuracy.dataset import Pair
from edgeseg.graph.proto import copied, refill
from edgeseg.graph.types import graph_macs
from edgeseg.mixed.judge import JUDGED_NAME, ImageTally, Judged, judge, pairs_key
from edgeseg.quantize.modules import Modules
from edgeseg.quantize.qdq import quantize_model
from edgeseg.quantize.schemes import QuantScheme
from edgeseg.quantize.suffix import SharedPrefix, SuffixSession, cut, float_values, value_bytes
from edgeseg.quantize.table import CalibrationTable
from edgeseg.store.cache import cached_folder, software
from edgeseg.store.documents import read_json, write_json
from edgeseg.store.hashing import sha256_json
from edgeseg.store.manifest import OnnxGraph
from edgeseg.store.onnx_file import read_onnx
from edgeseg.store.search import ModuleSensitivity

PREFIX_BUDGET_BYTES = 512 << 20
"""Values of the float graph held in memory at a time; more images are judged in stretches."""

LARGE_BYTES = 16 << 20
"""What a value of unknown size is taken to have: those of a graph of dynamic size are known when it runs only."""

IMAGES = 32
"""Images that modules are judged on in a build, which wants their order and no more."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class NetworkModules:
    """The modules of a float graph and what share of its multiply-accumulates each has."""

    graph: OnnxGraph
    modules: Modules
    mac_share: Mapping[str, float]

    @classmethod
    def of(cls, graph: OnnxGraph) -> NetworkModules:
        """Raises ``ArtifactError`` for a graph that cannot be read."""
        model = read_onnx(graph.path)
        modules = Modules.of(ir.serde.deserialize_model(model).graph)
        macs = dict.fromkeys(modules.names, 0)
        for name, count in graph_macs(model, graph.spec.input).items():
            owner = modules.owner(name)
            if owner is not None:
                macs[owner] += count
        total = sum(macs.values()) or 1
        return cls(graph, modules, {name: count / total for name, count in macs.items()})


def judge_modules(
    network: NetworkModules,
    table: CalibrationTable,
    scheme: QuantScheme,
    pairs: Sequence[Pair] | Iterator[Pair],
    *,
    progress: Progress | None = None,
    is_over: Callable[[], bool] = lambda: False,
    budget_bytes: int = PREFIX_BUDGET_BYTES,
) -> dict[str, Judged]:
    """Judge every module against the float graph.

    Args:
        network: of the float graph that ``table`` was made from.
        table: calibrated ranges.
        scheme: of the target.
        pairs: images, with masks or without; read once.
        progress: called with (modules times images done, in all, 0 where unknown).
        is_over: asked before each module; once it says so, what is known by then is returned.
        budget_bytes: see :data:`PREFIX_BUDGET_BYTES`.

    Returns:
        by module; a module that cannot be quantized by itself, or that there was no time for, is missing.

    Raises:
        QuantizationError: the graph does not run.
        InputError: an image that cannot be used.
    """
    bench = _Bench(network, table, scheme)
    stretch = max(1, budget_bytes // bench.bytes_per_image)
    total = len(pairs) if isinstance(pairs, Sequence) else 0
    tallies: dict[str, list[ImageTally]] = {name: [] for name in bench.modules}
    done, images = 0, iter(pairs)
    while chunk := list(islice(images, stretch)):
        with _Stretch(bench, chunk) as stretched:
            for position, name in enumerate(bench.modules):
                if is_over():
                    return _complete(tallies, network, done)
                tallies[name].extend(stretched.judged(name).images)
                if progress is not None:
                    progress(done * len(tallies) + len(chunk) * (position + 1), total * len(tallies))
        done += len(chunk)
    return _complete(tallies, network, done)


def _complete(tallies: Mapping[str, list[ImageTally]], network: NetworkModules, images: int) -> dict[str, Judged]:
    """All modules on the same images: those that every module was judged on, else those of the first stretch."""
    classes = network.graph.spec.model.classes
    return {name: Judged(classes, tuple(t[: images or None])) for name, t in tallies.items() if t}


class _Bench:
    """The float graph, and of each module what is needed to run the part that differs from it.

    The float graph's constants are in memory once, whatever the number of modules.
    """

    def __init__(self, network: NetworkModules, table: CalibrationTable, scheme: QuantScheme) -> None:
        self.spec = network.graph.spec
        self.key = [network.graph.sha256, sha256_json(table), scheme, self.spec, software()]
        self.model = read_onnx(network.graph.path)
        self._constants = {tensor.name: tensor for tensor in self.model.graph.initializer}
        known = float_values(self.model)
        self._parts: dict[str, onnx.ModelProto] = {}
        for name in network.modules.names:
            part = _alone(self.model, table, scheme, network.modules, name)
            if part is not None:
                part = cut(part, known)
                weights = part.graph.initializer
                refill(weights, (tensor for tensor in weights if tensor.name not in self._constants))
                self._parts[name] = part
        self.names = sorted({v.name for part in self._parts.values() for v in part.graph.input if v.name in known})
        sizes = [value_bytes(known[name]) for name in self.names]
        counted = [size for size in sizes if size is not None]
        self.bytes_per_image = sum(counted) + LARGE_BYTES * (len(sizes) - len(counted)) or 1

    @property
    def modules(self) -> tuple[str, ...]:
        """Those that can be quantized by themselves."""
        return tuple(self._parts)

    def part(self, module: str) -> onnx.ModelProto:
        """What :func:`~edgeseg.quantize.suffix.cut` left of the graph with this module on integers."""
        whole = copied(self._parts[module])
        read = {name for node in whole.graph.node for name in node.input}
        whole.graph.initializer.extend(self._constants[name] for name in sorted(read & self._constants.keys()))
        return whole


class _Stretch(Closing):
    """Judges modules on a few images; the float graph runs when the first is asked for that the cache does not hold."""

    def __init__(self, bench: _Bench, chunk: Sequence[Pair]) -> None:
        self._bench = bench
        self._chunk = chunk
        self._images = pairs_key(chunk)
        self._prefix: SharedPrefix | None = None

    def close(self) -> None:
        """Forget the values of the float graph."""
        self._prefix = None

    def judged(self, module: str) -> Judged:
        def make(folder: Path) -> None:
            write_json(folder / JUDGED_NAME, self._judge(module))

        folder, _ = cached_folder("judged", ["module", module, self._images, *self._bench.key], make)
        return read_json(folder / JUDGED_NAME, Judged, "judgement")

    def _judge(self, module: str) -> Judged:
        bench = self._bench
        if self._prefix is None:
            self._prefix = SharedPrefix(bench.model, bench.names)
        with SuffixSession(bench.part(module), self._prefix.values) as session:
            return judge(self._prefix, session, bench.spec, self._chunk)


def _alone(
    model: onnx.ModelProto, table: CalibrationTable, scheme: QuantScheme, modules: Modules, name: str
) -> onnx.ModelProto | None:
    """The graph with this module on integers and all others in float; ``None`` where no layer of it can be."""
    copy = ir.serde.deserialize_model(model)
    try:
        quantize_model(copy, table, scheme, modules.holds([other for other in modules.names if other != name]))
    except QuantizationError:
        return None
    return ir.serde.serialize_model(copy)


def sensitivities(
    network: NetworkModules, judged: Mapping[str, Judged], saved_ms: Mapping[str, float]
) -> tuple[ModuleSensitivity, ...]:
    """What was measured of every module of the network, in its order."""
    return tuple(
        ModuleSensitivity(
            module=name,
            mac_share=network.mac_share[name],
            agreement=judged[name].agreement() if name in judged else None,
            miou_drop=judged[name].miou_drop() if name in judged else None,
            class_drops=judged[name].class_drops() if name in judged else (),
            saved_ms=saved_ms.get(name),
        )
        for name in network.modules.names
    )
