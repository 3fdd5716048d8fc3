"""What a sweep is asked to do: ``sweep.toml``, checked before any work is done."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec

from edgeseg.arguments import PATH, arguments_of, one_of, request_of
from edgeseg.backends import BACKENDS
from edgeseg.decide.metrics import AGAINST_BASELINE, AGAINST_MASKS
from edgeseg.decide.requirement import Comparison, Node, Requirement
from edgeseg.demo import demo_models, sample_folder
from edgeseg.errors import SpecError, did_you_mean
from edgeseg.evaluate.accuracy.evaluation import AccuracyRequest
from edgeseg.evaluate.bench import BenchRequest
from edgeseg.evaluate.intervals import MIN_IMAGES
from edgeseg.pipeline.request import BuildRequest
from edgeseg.spec import ARCHITECTURES, PRECISIONS, OutputKind
from edgeseg.store.files import read_bounded

DEMO = "demo"
Positive: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class SweepConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``sweep.toml``: the lists are multiplied.

    Attributes:
        archs: SMP architectures.
        output: folder of the sweep: engines, results and reports.
        encoders: SMP encoders; empty: each checkpoint's own.
        sizes: ``HxW``; empty: each model's own.
        precisions, targets: as ``edgeseg build``.
        weights: per architecture (``default`` for the others): a path, in which ``{arch}`` and ``{encoder}`` are replaced,
            ``imagenet``, ``random`` or ``demo``, which is the default.
        output_kind: of the engines: ``mask``, or ``logits`` or ``probabilities``, of which a loss can be measured.
        classes, calibration, calibration_limit, validation, ignore_index: as ``edgeseg build``.
        require: as ``edgeseg report --require``.
        title: of the report.
        build: any other argument of :func:`edgeseg.build`, by Python's name; the same for every cell.
        bench: any argument of ``edgeseg bench`` about how to measure, by the option's name; ``data`` may be ``demo``.
            ``fresh_processes`` is 1 here. And ``together``: ``all``: every engine in turns with all others, so that all
            compare; ``model``: one run per architecture, encoder, size and weights, for sweeps whose engines do not fit into
            memory together.
    """

    archs: tuple[str, ...]
    output: str = "sweep"
    encoders: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("int8",)
    targets: tuple[str, ...] = ("auto",)
    weights: dict[str, str] = {}  # msgspec copies empty defaults
    output_kind: OutputKind = "mask"
    classes: Annotated[int, msgspec.Meta(ge=1, le=65536)] | None = None
    calibration: str | None = None
    calibration_limit: Positive | None = None
    validation: str | None = None
    ignore_index: int | None = None
    require: str | None = None
    title: str = "edgeseg sweep"
    build: dict[str, Any] = {}
    bench: dict[str, Any] = {}

    @property
    def data(self) -> Path | None:
        """The images accuracy is judged on."""
        place = self.bench.get("data")
        return None if place is None else sample_folder() / "val" if place == DEMO else PATH.accept("bench.data", place)

    def measuring(self) -> tuple[BenchRequest, AccuracyRequest]:
        """What ``bench`` asks for, checked. Raises ``SpecError``."""
        for name in self.bench.keys() - _OF_BENCH:
            raise SpecError(
                f"[bench] of the sweep: unknown field `{name}`{_where(name) or ';'} docs/sweep.md has an example"
            )
        given = {"fresh_processes": 1, **self.bench, "data": self.data, "ignore_index": self.ignore_index}
        one_of("bench.together", given.pop("together", "all"), ("all", "model"))
        speed = {argument.name for argument in arguments_of(BenchRequest).values()}
        of_speed = {name: value for name, value in given.items() if name in speed}
        of_data = {name: value for name, value in given.items() if name not in speed}
        return request_of(BenchRequest, "bench", of_speed), request_of(AccuracyRequest, "bench", of_data)


_PASSED_ON = ("output_kind", "classes", "calibration", "calibration_limit", "validation", "ignore_index")
"""Arguments of a build that are the same in every cell."""

_OF_BENCH = frozenset(
    argument.name for request in (BenchRequest, AccuracyRequest) for argument in arguments_of(request).values()
) - {"ignore_index"} | {"together"}


@dataclass(frozen=True)
class Cell:
    """One combination: ``name`` is its engine folder's, ``model`` what it shares with others of the same weights."""

    name: str
    model: str
    request: BuildRequest

    @property
    def folder(self) -> Path:
        """Of its engine."""
        assert self.request.folder is not None  # expand gives every cell its folder
        return self.request.folder


def read_config(path: Path) -> SweepConfig:
    """Read and check ``sweep.toml``; paths in it are relative to the file.

    Raises:
        SpecError: cannot be read, no TOML, an unknown or wrong field (named), or a combination that cannot be.
    """
    try:
        config = msgspec.toml.decode(read_bounded(path, "sweep", SpecError), type=SweepConfig)
        config.measuring()
    except SpecError:
        raise  # a ValueError too
    except RecursionError as exc:
        raise SpecError(f"{path} is no sweep: it is nested too deeply; docs/sweep.md has an example") from exc
    except (msgspec.DecodeError, ValueError) as exc:
        said = " ".join(str(exc).split())
        unknown = re.search(r"unknown field `(\w+)`", said)
        near = "" if unknown is None else _where(unknown[1])
        raise SpecError(f"{path} is no sweep: {said}{near or ';'} docs/sweep.md has an example") from exc
    return relative_to(config, path.parent)


def _where(field: str) -> str:
    """What was meant by a field that is not known where it stands."""
    if field in _OF_BENCH:
        return "; it belongs in [bench];"
    if field in SweepConfig.__struct_fields__:
        return "; it belongs above the first [table];"
    return did_you_mean(field, (*SweepConfig.__struct_fields__, *_OF_BENCH))


def relative_to(config: SweepConfig, folder: Path) -> SweepConfig:
    """The config with every path that is no absolute one taken from ``folder``."""

    def place(text: str | None, keep: tuple[str, ...] = ()) -> str | None:
        return text if text is None or text in keep else str(folder / text)

    words = (DEMO, "imagenet", "random")
    return msgspec.structs.replace(
        config,
        output=str(folder / config.output),
        weights={arch: place(value, words) or value for arch, value in config.weights.items()},
        calibration=place(config.calibration),
        validation=place(config.validation),
        bench={
            **config.bench,
            **({"data": place(data, (DEMO,))} if isinstance(data := config.bench.get("data"), str) else {}),
        },
    )


def expand(config: SweepConfig) -> tuple[Cell, ...]:
    """All combinations, in the order of the lists.

    Raises:
        SpecError: a value out of range, an empty list, an unknown name, a size that is none, the same combination twice, or a
            requirement on what is not measured.
    """
    try:
        # A struct made in Python has checked nothing yet.
        msgspec.convert(msgspec.to_builtins(config), SweepConfig)
    except msgspec.ValidationError as exc:
        raise SpecError(f"the sweep cannot be: {exc}") from exc
    # Before hours of building, not after.
    measuring = config.measuring()
    if config.require is not None:
        _check_require(Requirement.parse(config.require), *measuring)
    for field, allowed in (("archs", ARCHITECTURES), ("precisions", PRECISIONS), ("targets", ("auto", *BACKENDS))):
        if not getattr(config, field):
            raise SpecError(f"{field} of the sweep is empty; give at least one of {', '.join(allowed)}")
        for value in getattr(config, field):
            one_of(field, value, tuple(allowed))
    for arch in config.weights:
        one_of("weights", arch, (*ARCHITECTURES, "default"))
    cells = tuple(
        _cell(config, arch, encoder, size, precision, target)
        for arch, encoder, size, precision, target in itertools.product(
            config.archs, config.encoders or (None,), config.sizes or (None,), config.precisions, config.targets
        )
    )
    names = [cell.name for cell in cells]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SpecError(f"the sweep has {min(twice)} twice; name each architecture, encoder, size and target once")
    return cells


def _check_require(requirement: Requirement, bench: BenchRequest, accuracy: AccuracyRequest) -> None:
    """Raise ``SpecError`` for a requirement that the bench cannot meet, because it does not measure what it names."""
    causes: dict[str, str] = {}
    if accuracy.data is None:
        causes |= dict.fromkeys(
            (*AGAINST_MASKS, "agreement", "boundary_agreement"), "there is no bench.data to judge it on"
        )
    if not bench.baselines:
        causes |= dict.fromkeys(AGAINST_BASELINE, "bench.baseline is none")
    if accuracy.limit is not None and accuracy.limit < MIN_IMAGES:
        causes["miou_drop"] = f"bench.limit is {accuracy.limit}, and a drop needs at least {MIN_IMAGES} images"

    def missing(node: Node) -> tuple[str, ...]:
        """The figures without which the node cannot be met."""
        if isinstance(node, Comparison):
            return (node.metric.name,) if node.metric.name in causes else ()
        parts = [missing(part) for part in node.parts]
        return sum(parts, ()) if node.kind == "and" or all(parts) else ()

    for name in missing(requirement.root):
        raise SpecError(f"require of the sweep names {name}, which would not be measured: {causes[name]}")


def _cell(config: SweepConfig, arch: str, encoder: str | None, size: str | None, precision: str, target: str) -> Cell:
    weights = config.weights.get(arch, config.weights.get("default", DEMO))
    is_demo = weights == DEMO
    if is_demo and (encoder is not None or arch not in demo_models()):
        what = f"encoder {encoder}" if encoder is not None else arch
        raise SpecError(
            f"the sweep gives no weights for {arch}, and there is no demo model of {what} (there is one of "
            f"{', '.join(demo_models())}); add [weights] {arch} = a path, imagenet or random"
        )
    if not is_demo:
        weights = weights.replace("{arch}", arch).replace("{encoder}", encoder or "")
    model = "-".join(filter(None, (arch, encoder or (DEMO if is_demo else None), size)))
    name = re.sub(r"[^a-z0-9._-]", "-", f"{model}-{precision}-{target}".lower())
    arguments = {
        "arch": arch,
        "encoder": encoder,
        "weights": None if is_demo else weights,
        "precision": precision,
        "size": size,
        "target": target,
        "output": Path(config.output) / "engines" / name,
        "force": True,
        **{argument: getattr(config, argument) for argument in _PASSED_ON},
    }
    if twice := sorted(arguments.keys() & config.build.keys()):
        raise SpecError(f"{twice[0]} in [build] of the sweep is a field of the sweep itself; say it there")
    request = BuildRequest.of({**arguments, **config.build})
    return Cell(name, model, request)
