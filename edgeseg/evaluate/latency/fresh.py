"""Cold start and memory of one contender, measured in a process of its own.

``python -m edgeseg.evaluate.latency.fresh`` reads the contender as JSON from standard input and answers so on standard output:
nothing of the process that asks (its imports, its memory, its warm caches) is in the figures.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

import msgspec

from edgeseg.errors import BuildError
from edgeseg.evaluate.contenders import Contender, Opener
from edgeseg.evaluate.latency.protocol import noise_images
from edgeseg.evaluate.results import ColdStart, Memory
from edgeseg.machine.nvml import gpu_bytes
from edgeseg.machine.reading import read_sizes

RUNS = 5
TIMEOUT_S = 600.0
_MARK = "edgeseg-fresh:"


@dataclass(frozen=True, kw_only=True)
class FreshAnswer(Memory):
    """Milliseconds and bytes of one process; bytes are ``None`` where ``/proc`` does not tell."""

    import_ms: float
    load_ms: float
    first_mask_ms: float


def measure_fresh(contender: Contender, processes: int) -> tuple[ColdStart, Memory]:
    """Start ``processes`` processes one after the other and take medians (of memory: the largest).

    Raises:
        BuildError: a process failed; says with what.
    """
    answers = [_ask(contender) for _ in range(processes)]

    def middle(value: Callable[[FreshAnswer], float]) -> float:
        return median([value(answer) for answer in answers])

    def largest(name: str) -> int | None:
        values = [value for answer in answers if (value := getattr(answer, name)) is not None]
        return max(values) if values else None

    cold = ColdStart(
        import_ms=middle(lambda a: a.import_ms),
        load_ms=middle(lambda a: a.load_ms),
        first_mask_ms=middle(lambda a: a.first_mask_ms),
        total_ms=middle(lambda a: a.load_ms + a.first_mask_ms),
        processes=processes,
        totals_ms=tuple(round(a.load_ms + a.first_mask_ms, 3) for a in answers),
    )
    return cold, Memory(**{field.name: largest(field.name) for field in fields(Memory)})


def _ask(contender: Contender) -> FreshAnswer:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "edgeseg.evaluate.latency.fresh"],
            input=msgspec.json.encode(contender),
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise BuildError(f"{contender.name} gave no mask within {TIMEOUT_S:.0f} s in a fresh process") from exc
    lines = [line for line in done.stdout.decode(errors="replace").splitlines() if line.startswith(_MARK)]
    if done.returncode != 0 or not lines:
        said = " ".join(done.stderr.decode(errors="replace").split())[-300:]
        raise BuildError(f"{contender.name} failed in a fresh process (exit code {done.returncode}): {said}")
    return msgspec.json.decode(lines[-1].removeprefix(_MARK), type=FreshAnswer)


def answer(contender: Contender) -> FreshAnswer:
    """Load the contender in this process, and run it: once, and :data:`RUNS` times more."""
    start = time.perf_counter()
    _import_packages(contender)
    from edgeseg.runtime.segmenter import Segmenter

    imported = time.perf_counter()
    base = resident_bytes("VmRSS")
    opener = Opener()
    begin = time.perf_counter()
    session = opener.open(contender)
    segmenter = Segmenter(session, contender.spec)
    loaded = time.perf_counter()
    peak_while_loading, when_loaded = resident_bytes("VmHWM"), resident_bytes("VmRSS")
    was_reset = _reset_peak()
    spec = contender.spec.input
    image = noise_images(contender.spec, (spec.height, spec.width))
    before = time.perf_counter()
    segmenter(image)
    after = time.perf_counter()
    for _ in range(RUNS):
        segmenter(image)
    peak = resident_bytes("VmHWM")
    activation = None
    if peak is not None and when_loaded is not None and peak_while_loading is not None:
        activation = max(0, peak - (when_loaded if was_reset else peak_while_loading))
    gpu = gpu_bytes(os.getpid())
    if gpu is None:
        # A Jetson's driver tells of no process's memory; PyTorch counts its own.
        gpu = getattr(session, "gpu_bytes", None)
    segmenter.close()
    known = [value for value in (peak_while_loading, peak) if value is not None]
    return FreshAnswer(
        import_ms=(imported - start) * 1000,
        load_ms=(loaded - begin) * 1000,
        first_mask_ms=(after - before) * 1000,
        base_rss_bytes=base,
        peak_rss_bytes=max(known) if known else None,
        activation_bytes=activation,
        gpu_bytes=gpu,
    )


def resident_bytes(field: str, status: Path = Path("/proc/self/status")) -> int | None:
    """``VmRSS`` (resident now) or ``VmHWM`` (most so far) of this process, bytes; ``None`` off Linux.

    Not ``getrusage``: what that calls the peak is inherited from the process that started this one.
    """
    return read_sizes(status).get(field)


def _reset_peak() -> bool:
    """Start VmHWM anew from what is resident now; ``False`` where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _import_packages(contender: Contender) -> None:
    if contender.is_baseline:
        from edgeseg.backends import pytorch  # noqa: F401
        from edgeseg.convert import architectures

        architectures.import_smp()
        return
    from edgeseg.backends import get_backend
    from edgeseg.store.engine import read_manifest

    assert contender.folder is not None  # an engine has one
    get_backend(read_manifest(Path(contender.folder)).target).status()  # imports the vendor's package


def main() -> None:
    """Entry point of the fresh process."""
    answered = answer(msgspec.json.decode(sys.stdin.buffer.read(), type=Contender))
    # Marked: the libraries that were loaded may print too.
    print(_MARK + msgspec.json.encode(answered).decode(), flush=True)


if __name__ == "__main__":
    main()
