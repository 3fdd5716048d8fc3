"""``edgeseg sensitivity``: INT8 of each module by itself, judged and timed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from edgeseg.backends import get_backend
from edgeseg.backends.portable import builds_here
from edgeseg.errors import InputError
from edgeseg.evaluate.tables import counted
from edgeseg.pipeline.calibration import calibration_stage, judging_schemes
from edgeseg.pipeline.candidate import build_typed, write_typed
from edgeseg.pipeline.manifest_maker import ManifestMaker
from edgeseg.pipeline.plan import choose_targets, refuse_early
from edgeseg.pipeline.stages import export_stage, few_collections, load_stage, pipeline_spec
from edgeseg.pipeline.verification_data import calibration_and_held_out
from edgeseg.progress import Reporter, SilentReporter, stage
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.store.cache import usable_cache
from edgeseg.store.manifest import SCHEMA_VERSION
from edgeseg.store.search import SensitivityReport
from edgeseg.version import __version__

if TYPE_CHECKING:
    from edgeseg.pipeline.request import BuildRequest


@few_collections()
def run_sensitivity(request: BuildRequest, reporter: Reporter, limit: int) -> SensitivityReport:
    """Judge and time INT8 of each module by itself: ``edgeseg sensitivity``. Errors are those of a build.

    Args:
        request: of the network; of the target what it is judged and timed for.
        reporter: told about progress.
        limit: most images to judge on, evenly spread over those there are.

    Raises:
        InputError: no images to judge on.
    """
    from edgeseg.mixed.costs import profiles_from_file, times_from_file
    from edgeseg.mixed.judge import spread
    from edgeseg.mixed.sensitivity import NetworkModules, judge_modules, sensitivities
    from edgeseg.pipeline.goal import in_float, measured_times

    refuse_early(request, is_module=False, makes_engine=False)
    backend = get_backend(choose_targets(request, reporter)[0])
    scheme = request.scheme or backend.scheme
    loaded = load_stage(request, None, reporter)
    spec = pipeline_spec(request, loaded, reporter)
    if request.latency_from is not None:
        profiles_from_file(request.latency_from, spec.model)
    samples, data = calibration_and_held_out(request, loaded)
    if data is None:
        raise InputError("no images to judge modules on; give --data DIR")
    with usable_cache(reporter.note), tempfile.TemporaryDirectory(prefix="edgeseg-") as folder:
        scratch = Path(folder)
        graph, conversion = export_stage(loaded, spec, scratch, reporter)
        judges = judging_schemes(request, (backend.name,))
        trained = loaded.trained is not None
        graph, table = calibration_stage(request, graph, samples, judges, scratch, reporter, is_trained=trained)
        network, times = NetworkModules.of(graph), None
        if request.latency_from is not None:
            times = times_from_file(request.latency_from, spec.model, network.modules)
        elif builds_here(backend, scheme) and backend.status().available:
            make = ManifestMaker(request, loaded, spec, conversion, table, "sensitivity", None, request.model)
            with stage(reporter, "measure") as said:
                engines = []
                for name, wanted in (("int8", request), ("float", in_float(request, backend))):
                    typed = write_typed(wanted, backend, graph, table, scratch / name)
                    candidate = build_typed(wanted, backend, typed, SilentReporter(), scratch)
                    engines.append(make.write(candidate, {}, scratch / name, None))
                times = measured_times(network, *engines)
                said.append(f"{backend.name}: {len(network.modules.names)} modules, in int8 and in float")
        with stage(reporter, "modules") as said:
            judged = judge_modules(
                network, table, SCHEMES[scheme], spread(data.pairs, limit), progress=reporter.progress
            )
            modules = sensitivities(network, judged, {} if times is None else times.saved_ms)
            images = max((len(one.images) for one in judged.values()), default=0)
            said.append(f"{scheme}: {len(modules)} modules judged on {counted(images, 'image')}")
    return SensitivityReport(
        schema_version=SCHEMA_VERSION,
        edgeseg_version=__version__,
        spec=spec,
        target=backend.name,
        scheme=scheme,
        images=images,
        data=data.description,
        latency_source=None if times is None else times.source,
        modules=modules,
    )
