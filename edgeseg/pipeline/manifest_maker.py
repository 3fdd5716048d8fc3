"""The manifest of an engine folder in the making, and the files beside it."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeseg.backends.portable import check_options
from edgeseg.machine.packages import package_versions
from edgeseg.pipeline.candidate import TABLE_NAME, Candidate
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.spec import ModelRequest, PipelineSpec
from edgeseg.store.documents import write_json
from edgeseg.store.engine import Engine
from edgeseg.store.hashing import FileRef, sha256_json
from edgeseg.store.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest, Repair, Verification
from edgeseg.store.search import Search
from edgeseg.version import __version__

if TYPE_CHECKING:
    from edgeseg.convert.export import ConversionReport
    from edgeseg.convert.loaded import LoadedModel
    from edgeseg.pipeline.request import BuildRequest
    from edgeseg.quantize.table import CalibrationTable

CONVERT_PACKAGES = ("torch", "segmentation-models-pytorch", "timm", "onnx", "onnxscript", "onnxsim", "onnx-ir")


@dataclass(frozen=True)
class ManifestMaker:
    """What all manifests of one build have in common."""

    request: BuildRequest
    loaded: LoadedModel
    spec: PipelineSpec
    conversion: ConversionReport
    table: CalibrationTable | None
    name: str
    command: str | None
    model_request: ModelRequest | None
    search: Search | None = None

    def write(
        self,
        candidate: Candidate,
        medians: dict[str, float],
        folder: Path,
        verification: Verification | None,
    ) -> Engine:
        """Put the candidate's files and the manifest into ``folder``."""
        table = self.table
        for source in (candidate.graph.path, candidate.built.path, *candidate.built.extra_files):
            if source is not None and source.parent != folder:
                shutil.copyfile(source, folder / source.name)
        calibration = None
        if table is not None:
            table.save(folder / TABLE_NAME)
            calibration = FileRef.of(folder / TABLE_NAME)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            edgeseg_version=__version__,
            name=self.name,
            spec=self.spec,
            precision=candidate.built.precision,
            target=candidate.backend.name,
            scheme=candidate.graph.scheme,
            graph=FileRef.of(folder / candidate.graph.path.name),
            engine=None if candidate.built.path is None else FileRef.of(folder / candidate.built.path.name),
            calibration=calibration,
            extra_files=tuple(FileRef.of(folder / path.name) for path in candidate.built.extra_files),
            weights=self.loaded.weights,
            origin=self.loaded.origin,
            model_request=self.model_request,
            inputs_sha256={
                "weights": self.loaded.weights_sha256,
                "spec": sha256_json(self.spec),
                **({f"calibration_{cause}": value for cause, value in table.key.items()} if table else {}),
            },
            options=dict(candidate.built.options),
            options_given=self._options_given(candidate),
            versions={**package_versions(*CONVERT_PACKAGES), **candidate.built.versions},
            device=dict(candidate.built.device),
            candidates=medians,
            conversion=dataclasses.asdict(self.conversion),
            command=self.command,
            notes=self.loaded.notes,
            verification=verification,
            repairs=self._repairs(candidate),
            search=self.search,
        )
        write_json(folder / MANIFEST_NAME, manifest)
        return Engine(folder, manifest)

    def _repairs(self, candidate: Candidate) -> tuple[Repair, ...]:
        """Those of the table, judged in the scheme that rounds like the engine's; none for FP16, which takes its graph only."""
        from edgeseg.quantize.repair.fidelity import judge_of

        if self.table is None or candidate.built.precision.requested != "int8":
            return ()
        judge = judge_of(SCHEMES[candidate.graph.scheme or candidate.backend.scheme])
        return tuple(repair for repair in self.table.repairs if repair.scheme == judge)

    def _options_given(self, candidate: Candidate) -> dict[str, Any]:
        given = self.request.options_for(candidate.backend.name)
        # File names of a portable folder are for the device: this machine does not know them.
        return dict(given) if candidate.built.path is None else check_options(candidate.backend.name, given)
