"""What a build is about to do: refused early where it cannot be, else found, checked and told before the work begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeseg.arguments import one_of
from edgeseg.backends import AUTO_TARGETS, get_backend, require_builder
from edgeseg.backends.portable import DEVICE_TARGETS, check_options
from edgeseg.convert.architectures import require_arch, resolve_arch
from edgeseg.convert.checkpoint import existing_checkpoint
from edgeseg.convert.hub_models import fetch_model, is_hub_id
from edgeseg.demo import demo_files
from edgeseg.errors import SpecError
from edgeseg.evaluate.results import read_report
from edgeseg.evaluate.summary import input_line
from edgeseg.evaluate.tables import counted
from edgeseg.mixed.costs import profiles_from_file
from edgeseg.pipeline.stages import load_stage, pipeline_spec
from edgeseg.pipeline.verification_data import (
    Samples,
    VerificationData,
    calibration_and_held_out,
    check_images,
    verifies_on_calibration,
)
from edgeseg.progress import Reporter, stage
from edgeseg.quantize.calibration import method_or_default
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.spec import PipelineSpec
from edgeseg.store.engine import check_engine_folder

if TYPE_CHECKING:
    import torch  # noqa: TID251  # the type only

    from edgeseg.convert.loaded import LoadedModel
    from edgeseg.pipeline.request import BuildRequest


@dataclass(frozen=True)
class BuildPlan:
    """What a build is about to do, with everything it asks for found and checked."""

    targets: tuple[str, ...]
    loaded: LoadedModel
    spec: PipelineSpec
    folder: Path
    samples: Samples
    held_out: VerificationData | None

    def summary(self, request: BuildRequest) -> dict[str, Any]:
        """What ``--dry-run`` prints; ``None`` for what the build would do without."""
        model = self.loaded.model
        return {
            "folder": str(self.folder),
            "model": f"{model.display_name}, {counted(model.classes, 'class', 'classes')}, {model.task}",
            "weights": self.loaded.weights,
            "input": input_line(self.spec, is_default_size=request.size is None and not self.loaded.has_own_size),
            "output": self.spec.output.kind,
            "precision": request.precision,
            "targets": list(self.targets),
            "calibration": self._calibration(),
            "verification": None if self.held_out is None else self.held_out.description,
            "command": request.command,
        }

    def _calibration(self) -> str | None:
        if isinstance(self.samples, CalibrationSet):
            return f"{len(self.samples)} images of {self.samples.source}"
        return None if self.samples is None else f"table {self.samples if isinstance(self.samples, Path) else 'given'}"


def refuse_early(request: BuildRequest, *, is_module: bool, makes_engine: bool = True) -> None:
    """Refuse what can be seen to be impossible within a second, before torch is imported.

    Raises:
        SpecError, InputError, CheckpointError, ArtifactError, BuildError: see :func:`edgeseg.build`.
    """
    is_demo = not is_module and request.weights is None
    if is_demo:
        demo_files(require_arch(request.arch))
    elif request.weights is not None and is_hub_id(request.weights):
        fetch_model(request.weights, needs_preprocessing=request.mean is None)
    elif request.weights is not None and (Path(request.weights).suffix or "/" in request.weights):
        # Other words may name weights of the hub.
        existing_checkpoint(request.weights)
    if request.arch is not None:
        resolve_arch(request.arch)
    if request.scheme is not None:
        one_of("scheme", request.scheme, tuple(SCHEMES))
    method_or_default(request.calibration_method)
    if request.latency_from is not None:
        read_report(request.latency_from)
    folder = request.folder
    if folder is None and is_demo:
        folder = Path("engines") / default_name(require_arch(request.arch), DEMO_NAME, request.precision)
    if folder is not None and makes_engine:
        check_engine_folder(folder, force=request.force)
    check_images(request, is_demo=is_demo, is_module=is_module or request.is_onnx_file)


DEMO_NAME = "demo"
"""What the folder of a demo model is called by, in place of its encoder."""


def default_name(arch: str, encoder: str, precision: str) -> str:
    """``<arch>-<encoder>-<precision>``."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in f"{arch}-{encoder}-{precision}".lower())


def plan_build(request: BuildRequest, model: torch.nn.Module | None, reporter: Reporter) -> BuildPlan:
    """Refuse what cannot be, load the model, open the images, and say what the engine takes. Errors are the build's."""
    refuse_early(request, is_module=model is not None)
    targets = choose_targets(request, reporter)
    loaded = load_stage(request, model, reporter)
    spec = pipeline_spec(request, loaded, reporter)
    if request.latency_from is not None:
        profiles_from_file(request.latency_from, spec.model)
    encoder = DEMO_NAME if loaded.is_demo else loaded.model.encoder
    folder = request.folder or Path("engines") / default_name(loaded.model.arch, encoder, request.precision)
    check_engine_folder(folder, force=request.force)
    if request.precision == "fp32" and request.calibration is not None:
        used = "used to verify on only" if verifies_on_calibration(request) else "not used"
        reporter.note(f"--calibration is {used}: an fp32 engine has no ranges")
    with stage(reporter, "input") as said:
        samples, held_out = calibration_and_held_out(request, loaded)
        said.append(input_line(spec, is_default_size=request.size is None and not loaded.has_own_size))
    return BuildPlan(targets, loaded, spec, folder, samples, held_out)


def choose_targets(request: BuildRequest, reporter: Reporter) -> tuple[str, ...]:
    """The backends to build for: the one named, or for ``auto`` every one that can run here, to be measured.

    What cannot be had is said before minutes of work, not after: a backend that is not installed, an option nobody takes.

    Raises:
        BuildError: the backend cannot be used here.
        SpecError: an option, or a scheme, that the backend (with ``auto``: each of them) does not take.
    """
    target, scheme = request.target, request.scheme
    if target != "auto":
        if target not in DEVICE_TARGETS:
            require_builder(target)
        check_options(target, request.options_for(target))
        return (target,)
    usable = [name for name in AUTO_TARGETS if get_backend(name).status().available]
    if not usable:
        # Raises, naming the pip line of the default backend.
        require_builder(AUTO_TARGETS[0])
    if scheme is not None:
        usable = [name for name in usable if scheme.startswith(name)]
        if not usable:
            raise SpecError(f"scheme {scheme} is for none of {', '.join(AUTO_TARGETS)}; name its target with --target")
    refusals: dict[str, SpecError] = {}
    for name in usable:
        try:
            check_options(name, request.options_for(name))
        except SpecError as exc:
            refusals[name] = exc
    if len(refusals) == len(usable):
        raise next(iter(refusals.values()))
    for name, refusal in refusals.items():
        reporter.note(f"{name} is left out: {refusal}")
    return tuple(name for name in usable if name not in refusals)
