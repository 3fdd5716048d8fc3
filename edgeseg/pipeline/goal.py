"""``--max-drop`` and ``--min-agreement`` as a goal: where plain INT8 misses it, the fastest mix of precisions that meets it.

Every candidate is built and judged whole, on the images the build verifies on; what was judged is kept in the cache, so a build
that was ended goes on where it was. The ones that meet the goal are timed in turns at the end, where engines run here; where
they do not, their graphs travel with the folder and the device chooses.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgeseg.backends.base import Backend
from edgeseg.backends.cpu.options import CPU_OPTIONS
from edgeseg.backends.portable import builds_here
from edgeseg.errors import GateError
from edgeseg.evaluate.accuracy.dataset import Pair
from edgeseg.evaluate.results import Profile
from edgeseg.evaluate.tables import counted
from edgeseg.graph.types import typed_precision
from edgeseg.mixed.costs import ModuleTimes, module_times, times_from_file
from edgeseg.mixed.judge import JUDGED_NAME, Judged, Remembered, judge, pairs_key, spread
from edgeseg.mixed.search import by_gain, trials
from edgeseg.mixed.sensitivity import IMAGES, NetworkModules, judge_modules, sensitivities
from edgeseg.pipeline.candidate import GRAPH_NAME, Candidate, build_typed, measured_sessions, write_typed
from edgeseg.progress import Reporter, SilentReporter, stage
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.spec import Precision
from edgeseg.store.cache import cached_folder, software
from edgeseg.store.documents import read_json, write_json
from edgeseg.store.engine import Engine
from edgeseg.store.hashing import FileRef
from edgeseg.store.manifest import MIN_INT8_SHARE, OnnxGraph
from edgeseg.store.search import ModuleSensitivity, Search, SearchCandidate

if TYPE_CHECKING:
    from edgeseg.pipeline.request import BuildRequest
    from edgeseg.quantize.table import CalibrationTable

FINALISTS = 3
"""Mixed engines of a target that are timed against each other, beside its float engine."""

PROFILES, RUNS = 6, 5
"""Profiles of each engine, in turns, and runs of each: short ones, of which one at least is not disturbed."""

WriteEngine = Callable[[Candidate], Engine]


@dataclass
class Trial:
    """One engine that was looked at; built when it was judged as an engine, or when it is to be timed."""

    backend: Backend
    floats: frozenset[str]
    graph: OnnxGraph
    folder: Path
    judged: Judged
    mac_share: Mapping[str, float]
    meets_goal: bool
    estimated_ms: float | None
    candidate: Candidate | None = None
    median_ms: float | None = None

    @property
    def name(self) -> str:
        """The folder's: unique in a build."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def is_mixed(self) -> bool:
        """Neither INT8 nor float throughout."""
        return self.graph.precision == "int8" and bool(self.floats)


def has_goal(request: BuildRequest) -> bool:
    """Whether a build of this request may search."""
    wanted = request.max_drop is not None or request.min_agreement is not None
    # By implicit calibration TensorRT decides itself what is INT8.
    return (
        wanted
        and request.search
        and request.precision == "int8"
        and not request.backend_options.get("implicit_calibration")
    )


def in_float(request: BuildRequest, backend: Backend) -> BuildRequest:
    """The request for what an int8 engine's float modules are, throughout: FP16 where the target has it."""
    half = SCHEMES[request.scheme or backend.scheme].half
    return dataclasses.replace(request, precision="fp16" if half else "fp32")


@dataclass
class GoalSearch:
    """What all targets of one build have in common.

    Attributes:
        request: of the build, with a goal.
        graph: fp32, that ``table`` was made from.
        pairs: images to judge on; read again for every candidate.
        reference: PyTorch, which has seen all of ``pairs``.
        write: puts a candidate's files and a manifest into its folder.
        engines_folder: see :class:`~edgeseg.backends.base.BuildContext`.
    """

    request: BuildRequest
    graph: OnnxGraph
    table: CalibrationTable
    pairs: Iterable[Pair]
    reference: Remembered
    write: WriteEngine
    engines_folder: Path
    reporter: Reporter
    _is_complete: bool = True
    _images: str = ""
    _portable: set[str] = field(default_factory=set)
    _modules: dict[str, tuple[ModuleSensitivity, ...]] = field(default_factory=dict)
    _times: dict[str, ModuleTimes | None] = field(default_factory=dict)

    def run(self, plain: Sequence[Candidate]) -> tuple[Candidate, tuple[Path, ...], Search]:
        """Search for every target, beginning with those whose plain INT8 engine is in ``plain``.

        Returns:
            the engine that meets the goal, the graphs the device is to choose from, and the record for the manifest.

        Raises:
            GateError: not even a float engine meets the goal.
        """
        deadline = time.monotonic() + 60 * self.request.search_minutes
        # A judgement is one beside these masks: the module's code may have changed, and nothing else.
        self._images = f"{pairs_key(self.pairs)} {self.reference.digest()}"
        self._portable = {c.backend.name for c in plain if not builds_here(c.backend, c.graph.scheme)}
        everything: list[Trial] = []
        for position, candidate in enumerate(plain):
            now = time.monotonic()
            everything += self._search(candidate, now + (deadline - now) / (len(plain) - position))
        eligible = [trial for trial in everything if trial.meets_goal]
        if not eligible:
            raise GateError(self._missed(everything))
        is_timed = self._time(everything)
        chosen = min(eligible, key=self._cost if not is_timed else lambda t: (t.median_ms is None, t.median_ms or 0.0))
        self._say(chosen, is_timed)
        carried = [] if is_timed else self._carried(chosen, eligible)
        record = self._record(everything, chosen, carried)
        return self._built(chosen), tuple(trial.graph.path for trial in carried), record

    def _search(self, plain: Candidate, until: float) -> list[Trial]:
        """All that was tried for one target: plain INT8, what is all in float, mixes of both."""
        backend, folder = plain.backend, plain.folder
        network = NetworkModules.of(self.graph)
        first = self._judged(backend, plain.graph, folder, frozenset(), plain)
        floats = self._in_float(backend, folder, in_float(self.request, backend).precision, network)
        tried = [first, floats]
        if first.meets_goal:
            return tried
        if not self._meets(floats.judged):
            # A mix with FP16 has no more than FP16 itself has.
            return (
                [*tried, self._in_float(backend, folder, "fp32", network)]
                if floats.graph.precision == "fp16"
                else tried
            )
        times = self._times[backend.name] = self._module_times(network, first, floats)
        if times is not None:
            first.estimated_ms = times.estimate_ms(())
            floats.estimated_ms = times.estimate_ms(network.modules.names)
        saved = {} if times is None else times.saved_ms

        over = False

        def is_over() -> bool:
            nonlocal over
            over = over or time.monotonic() > until
            return over

        with stage(self.reporter, "modules") as said:
            judged = judge_modules(
                network,
                self.table,
                SCHEMES[first.graph.scheme or backend.scheme],
                spread(self.pairs, IMAGES),
                progress=self.reporter.progress,
                is_over=is_over,
            )
            modules = {m.module: m for m in sensitivities(network, judged, saved)}
            losses = {name: _loss(module) for name, module in modules.items() if module.agreement is not None}
            costs = saved if any(ms > 0 for ms in saved.values()) else network.mac_share
            # What cannot be INT8 by itself is float in any mix.
            names = [name for name in network.modules.names if name in judged or over]
            order = by_gain(losses, costs, names)
            self._modules[backend.name] = tuple(modules[name] for name in order)
            said.append(f"{backend.name}: {len(order)} modules; INT8 of {order[0]} costs most for what it saves")
        with stage(self.reporter, "search") as said:

            def meets(names: frozenset[str]) -> bool:
                place = folder / f"mixed{len(tried)}"
                graph = write_typed(self.request, backend, self.graph, self.table, place, names)
                trial = self._judged(backend, graph, place, names)
                trial.estimated_ms = None if times is None else times.estimate_ms(names)
                tried.append(trial)
                self.reporter.progress(len(tried) - 2, 0)
                return trial.meets_goal

            for _ in trials(order, costs, meets):
                if is_over():
                    break
            self._is_complete = self._is_complete and not over
            met = sum(trial.meets_goal for trial in tried[2:])
            said.append(f"{backend.name}: {counted(len(tried) - 2, 'mix', 'mixes')} judged, {met} of them good enough")
        return tried

    def _in_float(self, backend: Backend, folder: Path, precision: Precision, network: NetworkModules) -> Trial:
        """The engine with every module in float."""
        place = folder / precision
        request = dataclasses.replace(self.request, precision=precision)
        graph = write_typed(request, backend, self.graph, self.table, place)
        return self._judged(backend, graph, place, frozenset(network.modules.names))

    def _judged(
        self,
        backend: Backend,
        graph: OnnxGraph,
        folder: Path,
        names: frozenset[str],
        candidate: Candidate | None = None,
    ) -> Trial:
        """Judge a typed graph: as an engine on a CPU target of this machine, else as it is written."""
        as_engine = backend.name in CPU_OPTIONS and backend.name not in self._portable
        trial = Trial(backend, names, graph, folder, Judged(1, ()), {}, False, None, candidate)

        def make(place: Path) -> None:
            if as_engine:
                opened = backend.load(self.write(self._built(trial)))
            else:
                from edgeseg.backends.cpu.onnxruntime import open_unoptimized

                opened = open_unoptimized(graph.path)
            with opened as session:
                write_json(place / JUDGED_NAME, judge(self.reference, session, graph.spec, self.pairs))

        how = [backend.name, self.request.options_for(backend.name)] if as_engine else ["graph"]
        key = ["engine", graph.sha256, self.graph.sha256, graph.weights_sha256, how, self._images, graph.spec]
        place, _ = cached_folder("judged", [*key, software()], make)
        trial.judged = read_json(place / JUDGED_NAME, Judged, "judgement")
        precision = (
            typed_precision(graph.path, graph.precision, graph.spec.input)
            if trial.candidate is None
            else trial.candidate.built.precision
        )
        trial.mac_share = precision.mac_share
        # The default says what "int8" promises where nothing else was asked for; a goal asks for something else.
        least = self.request.min_int8_share
        has_share = least in (MIN_INT8_SHARE, 0.0) or precision.mac_share.get("int8", 0.0) >= least
        trial.meets_goal = self._meets(trial.judged) and has_share
        return trial

    def _built(self, trial: Trial) -> Candidate:
        """The trial's engine, built now if it was not yet."""
        if trial.candidate is None:
            request = dataclasses.replace(self.request, precision=trial.graph.precision)
            # Its notes are those of the plain engine again.
            trial.candidate = build_typed(
                request,
                trial.backend,
                trial.graph,
                SilentReporter(),
                self.engines_folder,
                is_portable=trial.backend.name in self._portable,
            )
            trial.mac_share = trial.candidate.built.precision.mac_share
        return trial.candidate

    def _meets(self, judged: Judged) -> bool:
        drop, request = judged.miou_drop(), self.request
        if request.max_drop is not None and (drop is None or drop.value > request.max_drop):
            return False
        return request.min_agreement is None or judged.agreement().value >= request.min_agreement

    def _module_times(self, network: NetworkModules, int8: Trial, floats: Trial) -> ModuleTimes | None:
        """Milliseconds by module: from a file, else measured here, else ``None``."""
        if self.request.latency_from is not None:
            return times_from_file(self.request.latency_from, self.graph.spec.model, network.modules)
        if not self._runs_here(int8):
            return None
        return measured_times(network, *(self.write(self._built(trial)) for trial in (int8, floats)))

    def _runs_here(self, trial: Trial) -> bool:
        return trial.backend.name not in self._portable and trial.backend.status().available

    def _time(self, everything: Sequence[Trial]) -> bool:
        """Time plain INT8, float and the finalists of every target in turns; whether engines run here at all."""
        if not all(map(self._runs_here, everything)):
            return False
        timed = []
        for name in dict.fromkeys(trial.backend.name for trial in everything):
            mine = [trial for trial in everything if trial.backend.name == name]
            mixed = [trial for trial in mine if trial.is_mixed and trial.meets_goal]
            timed += [*(trial for trial in mine if not trial.is_mixed), *self._finalists(mixed)]
        with stage(self.reporter, "measure") as said, ExitStack() as opened:
            engines = {trial.name: self.write(self._built(trial)) for trial in timed}
            sessions = {trial.name: opened.enter_context(trial.backend.load(engines[trial.name])) for trial in timed}
            measured = measured_sessions(self.request, sessions, self.graph.spec)
            for trial in timed:
                trial.median_ms = measured[trial.name].median_ms
            said.append(f"{len(timed)} engines in turns")
        return True

    def _carried(self, chosen: Trial, eligible: Sequence[Trial]) -> list[Trial]:
        """The engines the device chooses from, the one that is expected to be the fastest first."""
        mine = [trial for trial in eligible if trial.backend is chosen.backend]
        mixed = self._finalists(
            [trial for trial in mine if trial.graph.precision == "int8"]
        )  # plain INT8 may meet it too
        carried = [*mixed, *(trial for trial in mine if trial.graph.precision != "int8")]
        carried.remove(chosen)
        return [chosen, *carried]

    def _finalists(self, trials: Sequence[Trial]) -> list[Trial]:
        return sorted(trials, key=self._cost)[:FINALISTS]

    def _cost(self, trial: Trial) -> tuple[float, float]:
        """What a trial is expected to take: by the times of its modules, else by its work in float."""
        return (trial.estimated_ms or 0.0, 1.0 - trial.mac_share.get("int8", 0.0))

    def _say(self, chosen: Trial, is_timed: bool) -> None:
        if not self._is_complete:
            self.reporter.note(
                f"the search ended at its limit of {self.request.search_minutes:g} minutes with the best so far; the next "
                "build goes on from there (--search-minutes)"
            )
        if chosen.graph.precision != "int8":
            self.reporter.note(f"no mix with INT8 met the goal: the engine is {chosen.graph.precision}")
        elif chosen.floats:
            share = chosen.mac_share.get("int8", 0.0)
            self.reporter.note(
                f"in float for the goal: {', '.join(sorted(chosen.floats))}; {share:.1%} of MACs are int8"
            )

    def _missed(self, everything: Sequence[Trial]) -> str:
        """Why no engine can be delivered, with figures."""
        floats = [trial for trial in everything if trial.graph.precision != "int8"][-1]
        said, request = [], self.request
        agreement, drop = floats.judged.agreement(), floats.judged.miou_drop()
        if request.min_agreement is not None:
            said.append(f"agrees on {agreement.value:.4f} of pixels, --min-agreement wants {request.min_agreement:g}")
        if request.max_drop is not None and drop is not None:
            said.append(f"loses {drop.value:.4f} mIoU, --max-drop allows {request.max_drop:g}")
        kind = floats.graph.precision
        if self._meets(floats.judged):
            return (
                f"no engine with {request.min_int8_share:.0%} of the work in int8 (--min-int8-share) meets the goal; "
                f"the {kind} engine {' and '.join(said)} ({counted(len(floats.judged.images), 'image')})"
            )
        return (
            f"not even the {kind} engine meets the goal: it {' and '.join(said)} "
            f"({counted(len(floats.judged.images), 'image')}); set another goal, or look at how the model was exported"
        )

    def _record(self, everything: Sequence[Trial], chosen: Trial, carried: Sequence[Trial]) -> Search:
        times = self._times.get(chosen.backend.name)
        names = carried_names(len(carried))
        files = {id(t): dataclasses.replace(FileRef.of(t.graph.path), name=names[k]) for k, t in enumerate(carried)}
        return Search(
            max_drop=self.request.max_drop,
            min_agreement=self.request.min_agreement,
            images=len(chosen.judged.images),
            is_complete=self._is_complete,
            latency_source=None if times is None else times.source,
            modules=self._modules.get(chosen.backend.name, ()),
            candidates=tuple(
                SearchCandidate(
                    target=trial.backend.name,
                    precision=trial.graph.precision,
                    float_modules=tuple(sorted(trial.floats)) if trial.graph.precision == "int8" else (),
                    mac_share=dict(trial.mac_share),
                    agreement=trial.judged.agreement(),
                    miou_drop=trial.judged.miou_drop(),
                    meets_goal=trial.meets_goal,
                    median_ms=trial.median_ms,
                    estimated_ms=trial.estimated_ms,
                    size_bytes=_size_bytes(trial),
                    scheme=trial.graph.scheme,
                    graph=files.get(id(trial)),
                )
                for trial in everything
            ),
            chosen=list(map(id, everything)).index(id(chosen)),
        )


def measured_times(network: NetworkModules, int8: Engine, floats: Engine) -> ModuleTimes:
    """Milliseconds by module of both engines, profiled in turns."""
    from edgeseg.evaluate.latency.profile import profile_engine

    ours: list[Profile] = []
    theirs: list[Profile] = []
    for _ in range(PROFILES):
        for engine, profiles in ((int8, ours), (floats, theirs)):
            profiles.append(profile_engine(engine, RUNS))
    return module_times(ours, theirs, network.modules, f"the {ours[0].source} on this machine")


def carried_names(count: int) -> tuple[str, ...]:
    """File names of the graphs that travel with a folder, the chosen one's first."""
    return (GRAPH_NAME, *(f"candidate-{k}.onnx" for k in range(2, count + 1)))[:count]


def _size_bytes(trial: Trial) -> int:
    built = None if trial.candidate is None else trial.candidate.built.path
    return (built or trial.graph.path).stat().st_size


def _loss(module: ModuleSensitivity) -> float:
    """Accuracy that INT8 of a module costs. Pixels that change count throughout: on few images mIoU alone is mostly noise."""
    assert module.agreement is not None
    drop = 0.0 if module.miou_drop is None else module.miou_drop.value
    return 1.0 - module.agreement.value + max(drop, 0.0)
