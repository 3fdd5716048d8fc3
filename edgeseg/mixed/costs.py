"""What INT8 of each module saves in milliseconds: measured here, or read from a bench of the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeseg.errors import SpecError
from edgeseg.evaluate.results import Profile, read_report
from edgeseg.quantize.modules import Modules
from edgeseg.spec import ModelSpec

_FLOATS = ("fp16", "fp32")


@dataclass(frozen=True)
class ModuleTimes:
    """Milliseconds by module, of an int8 engine and of a float one.

    Attributes:
        int8_ms, float_ms: by module; a module that a profile does not name takes no time.
        source: where they are from, in words.
    """

    int8_ms: Mapping[str, float]
    float_ms: Mapping[str, float]
    source: str

    @property
    def saved_ms(self) -> dict[str, float]:
        """By module; negative where INT8 is slower."""
        return {name: self.float_ms[name] - self.int8_ms[name] for name in self.int8_ms}

    def estimate_ms(self, float_modules: Iterable[str]) -> float:
        """Of an engine with these modules in float, as if times of modules added up."""
        saved = self.saved_ms
        return sum(self.int8_ms.values()) + sum(saved[name] for name in float_modules)


def module_times(int8: Sequence[Profile], floats: Sequence[Profile], modules: Modules, source: str) -> ModuleTimes:
    """Sum profiles by module; of several of one engine the least counts, which other processes disturbed least.

    What belongs to no module takes as long in any mix, and is left out.
    """
    return ModuleTimes(_by_module(int8, modules), _by_module(floats, modules), source)


def _by_module(profiles: Sequence[Profile], modules: Modules) -> dict[str, float]:
    sums = []
    for profile in profiles:
        times = dict.fromkeys(modules.names, 0.0)
        for module in profile.modules:
            owner = modules.owners.get(module.module)
            if owner is not None:
                times[owner] += module.time_ms
        sums.append(times)
    return {name: min(times[name] for times in sums) for name in modules.names}


def times_from_file(path: Path, model: ModelSpec, modules: Modules) -> ModuleTimes:
    """Milliseconds by module from the JSON of an ``edgeseg bench --profile``. Errors are :func:`profiles_from_file`'s."""
    int8, floats = profiles_from_file(path, model)
    return module_times([int8], [floats], modules, f"the bench {path.name}")


def profiles_from_file(path: Path, model: ModelSpec) -> tuple[Profile, Profile]:
    """The profiles of an int8 engine of the model and of a float one, fp16 where there is one.

    Raises:
        ArtifactError: no such file, or none of a bench.
        SpecError: it holds no profile of both an int8 and a float engine of this model.
    """
    ours = (
        row for row in read_report(path).rows if (row.engine.arch, row.engine.encoder) == (model.arch, model.encoder)
    )
    rows = [row for row in ours if row.profile is not None]
    int8 = next((row.profile for row in rows if row.engine.precision == "int8"), None)
    floats = next((r.profile for kind in _FLOATS for r in rows if r.engine.precision == kind), None)
    if int8 is None or floats is None:
        missing = " and ".join(what for what, row in (("an int8", int8), ("an fp16 or fp32", floats)) if row is None)
        raise SpecError(
            f"{path} holds no profile of {missing} engine of this {model.arch}; on the device run: "
            "edgeseg bench INT8_DIR FP16_DIR --profile --json FILE"
        )
    return int8, floats
