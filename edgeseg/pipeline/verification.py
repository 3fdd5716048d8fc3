"""The engine of a build beside the PyTorch model it came from."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgeseg.backends import GPU_TARGETS, get_backend
from edgeseg.backends.portable import measured_on, open_graph
from edgeseg.closing import Closing
from edgeseg.errors import SpecError
from edgeseg.evaluate.tables import counted
from edgeseg.evaluate.verify import missed_gates
from edgeseg.pipeline.goal import has_goal
from edgeseg.pipeline.verification_data import VerificationData
from edgeseg.progress import Reporter, stage
from edgeseg.spec import PipelineSpec
from edgeseg.store.engine import Engine
from edgeseg.store.manifest import Verification

if TYPE_CHECKING:
    from edgeseg.backends.base import Session
    from edgeseg.convert.loaded import LoadedModel
    from edgeseg.pipeline.request import BuildRequest


WITH_FAKE_QUANTIZERS = "PyTorch is the module with its fake-quantizers on"
AS_WRITTEN = "the ONNX file is run by ONNX Runtime without optimization, and timed as it runs by default"


class Verifier(Closing):
    """The PyTorch model as the reference of a build, and the images it is run on.

    With a goal, several engines are compared with it: what it returned is kept until the build ends.
    """

    def __init__(self, request: BuildRequest, loaded: LoadedModel, data: VerificationData) -> None:
        self.request = request
        self.loaded = loaded
        self.data = data
        self.device = "cpu"
        """PyTorch's, where it was asked last."""
        self._opened = ExitStack()

    def close(self) -> None:
        """Forget what PyTorch returned."""
        self._opened.close()

    @functools.cached_property
    def memory(self) -> Path:
        """Where PyTorch's results are kept for the engines after the first."""
        return Path(self._opened.enter_context(tempfile.TemporaryDirectory(prefix="edgeseg-")))

    @contextmanager
    def reference(self, spec: PipelineSpec, device: str = "cpu") -> Iterator[tuple[Session, Session]]:
        """(what to compare with, what to time) while it is open, both on ``device``."""
        self.device = device
        from edgeseg.backends.pytorch import PyTorchSession
        from edgeseg.machine.cpu import this_cpu

        # As bench runs it: by itself PyTorch may take more threads than this process has cores.
        threads, on_gpu = this_cpu().cores, device == "cuda"
        with ExitStack() as stack:
            session: Session = stack.enter_context(
                PyTorchSession(self.loaded, spec, threads=threads, device=device, exact=on_gpu)
            )
            timed = session
            timed_model = self.loaded.as_timed()
            if on_gpu or timed_model is not self.loaded:
                timed = stack.enter_context(PyTorchSession(timed_model, spec, threads=threads, device=device))
            if has_goal(self.request):
                from edgeseg.mixed.judge import Remembered

                session = Remembered(session, self.memory / device)
            yield session, timed

    def misses(self, verification: Verification | None) -> bool:
        """Whether the engine misses a goal that a search may reach."""
        request = self.request
        if verification is None or not has_goal(request):
            return False
        return bool(missed_gates(verification, max_drop=request.max_drop, min_agreement=request.min_agreement))


def verify_stage(
    request: BuildRequest, engine: Engine, verifier: Verifier | None, reporter: Reporter
) -> Verification | None:
    """Compare the engine with the PyTorch model on held-out images."""
    if verifier is None:
        if request.max_drop is not None or request.min_agreement is not None:
            raise SpecError("--max-drop and --min-agreement need images to verify on; give --validation DIR")
        reporter.note("not verified: no images were given; --validation DIR compares the engine with its model")
        return None
    from edgeseg.backends.pytorch import PyTorchSession, why_no_cuda
    from edgeseg.evaluate.latency.protocol import SHORT
    from edgeseg.evaluate.verify import TIE, TIE_TF32, agreement_without_ties, check_fidelity, verify

    spec, data, loaded = engine.manifest.spec, verifier.data, verifier.loaded
    how = AS_WRITTEN if loaded.onnx_bytes is not None else "" if loaded.trained is None else WITH_FAKE_QUANTIZERS
    described = f"{data.description}; {how}" if how else data.description
    with stage(reporter, "verify") as said:
        backend = get_backend(engine.manifest.target)
        runs_here = engine.manifest.engine is not None and backend.status().available
        opened = backend.load(engine) if runs_here else open_graph(engine)
        on_gpu = runs_here and backend.name in GPU_TARGETS
        missing = None
        if on_gpu:
            missing = why_no_cuda() if loaded.onnx_bytes is None else "it is run on the CPU"
        device = "cuda" if on_gpu and missing is None else "cpu"
        with verifier.reference(spec, device) as (reference, timed), opened as session:
            verification = verify(
                reference,
                session,
                spec,
                data.pairs,
                data=described if runs_here else f"{described}; {measured_on(engine.manifest)}",
                reference_name=loaded.reference,
                reference_size_bytes=loaded.size_bytes,
                engine_size_bytes=(engine.manifest.engine or engine.manifest.graph).size_bytes,
                # Never beside PyTorch on another device: the ratio would be of a GPU and a CPU.
                protocol=SHORT if runs_here and missing is None else None,
                timed_reference=timed,
                progress=reporter.progress,
            )
            said.append(f"{counted(verification.images, 'image')}, agreement {verification.agreement:.4f}")

            def without_ties() -> float:
                tie = TIE_TF32 if engine.manifest.options.get("tf32") else TIE
                with PyTorchSession(loaded, spec, with_scores=True) as telling:
                    return agreement_without_ties(telling, session, spec, data.pairs, tie)

            note = check_fidelity(verification, engine.manifest.precision.requested, without_ties)
    if missing is not None:
        reporter.note(
            f"not timed beside {loaded.reference}: {missing}, and the engine runs on the GPU; edgeseg bench times it"
        )
    if note is not None:
        reporter.note(note)
    return verification
