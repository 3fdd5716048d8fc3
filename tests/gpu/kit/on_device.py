"""Run everything on a machine with an NVIDIA GPU and TensorRT, and leave raw JSON that names the card.

    python tests/gpu/kit/on_device.py OUTPUT_FOLDER [--folders FOLDER] [--torch-python PYTHON] [--only STEP ...]
        [--option NAME=VALUE ...] [--target tensorrt]

FOLDER is what ``folders.py`` made (``engines/`` and ``images/``). Steps, the cheapest first, each in processes of its own
with a time limit, so that one that hangs or dies costs only itself; what was done before is not done again:

- ``device``: the card, its driver, TensorRT, PyTorch.
- ``cuda``, ``suite``: pytest on the CUDA layer and PyTorch, then all of ``tests/gpu``; ``report-*.json``.
- ``questions``: TensorRT 8 only: which ways of writing Q/DQ it takes (``questions.py``).
- ``compile``: every folder, twice: the second time with the kernel times of the first. Shares of multiply-accumulates and
  time per dtype, as the engine's inspector and profiler tell.
- ``agreement``: masks of every engine beside those of PyTorch on the GPU (of ONNX Runtime where there is none).
- ``bench``: every architecture's engines beside PyTorch on the GPU, in turns; accuracy on the images.
- ``graphs``, ``threads``: one engine with and without CUDA graphs, and called by 1, 2, 4 and 8 threads.
- ``soak``: 10,000 inferences of one engine; memory of the GPU and the process before and after.

``--torch-python`` is a Python with a PyTorch for CUDA, edgeseg's requirements and segmentation-models-pytorch, for when the
one with TensorRT has none: its masks and times are taken by themselves then, not in turns. Exit status: how many steps failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
BASELINES = ("pytorch", "pytorch-channels-last", "pytorch-fp16", "pytorch-bf16", "pytorch-compile")
ONE = "unet-int8"
"""The engine of the steps that look at one."""
Step = Callable[["Session"], Any]


class Session:
    """Where things are, and how programs are started."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.output: Path = asked.output.resolve()
        self.folders: Path | None = None if asked.folders is None else asked.folders.resolve()
        self.torch_python: str | None = asked.torch_python
        self.target: str = asked.target
        self.options = [word for option in asked.option for word in ("--backend-option", option)]
        self.runner: list[str] = ["-m", "no_external_tactics"] if asked.no_external_tactics else ["-m"]
        self.card = "unknown"
        self.output.mkdir(parents=True, exist_ok=True)

    @property
    def portable(self) -> list[Path]:
        if self.folders is None:
            raise RuntimeError("no folders: give --folders what folders.py made")
        return sorted(path for path in (self.folders / "engines").iterdir() if (path / "manifest.json").is_file())

    @property
    def compiled(self) -> list[Path]:
        return sorted(path for path in (self.output / "engines").glob("*") if (path / "manifest.json").is_file())

    def start(self, words: list[str], limit_s: float, python: str = sys.executable) -> dict[str, Any]:
        """Run one program; what it printed, how it ended and how long it took."""
        begun = time.perf_counter()
        environment = {**os.environ, "CUDA_MODULE_LOADING": "LAZY"}
        path = [environment["PYTHONPATH"]] if "PYTHONPATH" in environment else []
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent), *path])
        try:
            done = subprocess.run([python, *words], capture_output=True, text=True, timeout=limit_s, env=environment)
            ended: int | str = done.returncode
            stdout, stderr = done.stdout, done.stderr
        except subprocess.TimeoutExpired:
            ended, stdout, stderr = f"after {limit_s:g} s", "", ""
        return {
            "ended": ended,
            "seconds": round(time.perf_counter() - begun, 2),
            "stdout": stdout,
            "stderr": stderr[-3000:],
        }

    def module(self, *words: str | Path, limit_s: float = 600, python: str = sys.executable) -> dict[str, Any]:
        runner = self.runner if python == sys.executable else ["-m"]
        return self.start([*runner, *map(str, words)], limit_s, python)

    def edgeseg(self, *words: str | Path, limit_s: float = 600) -> Any:
        """A verb with ``--json``: its object, or an error."""
        done = self.module("edgeseg", *words, limit_s=limit_s)
        if done["ended"] != 0:
            said = done["stderr"][-800:] or done["stdout"][-800:]
            raise RuntimeError(f"edgeseg {' '.join(map(str, words))}: {done['ended']}: {said}")
        return json.loads(done["stdout"]) if done["stdout"].lstrip().startswith(("{", "[")) else done["stdout"]

    def write(self, name: str, value: Any) -> None:
        (self.output / name).write_text(json.dumps({"card": self.card, "result": value}, indent=1, default=str) + "\n")


def device(session: Session) -> Any:
    """What is here."""
    program = (
        "import json, sys\n"
        "facts = {'python': sys.version.split()[0]}\n"
        "try:\n"
        "    from edgeseg.backends.cuda.device import open_cuda\n"
        "    with open_cuda() as cuda:\n"
        "        facts['cuda'] = vars(cuda.device) | {'free_total': cuda.memory_info()}\n"
        "except Exception as exc: facts['cuda'] = repr(exc)\n"
        "for name in ('tensorrt', 'torch', 'onnxruntime', 'numpy'):\n"
        "    try: facts[name] = __import__(name).__version__\n"
        "    except Exception as exc: facts[name] = repr(exc)\n"
        "try:\n"
        "    from edgeseg.backends.pytorch import why_no_cuda\n"
        "    facts['torch_on_gpu'] = why_no_cuda() or 'yes'\n"
        "except Exception as exc: facts['torch_on_gpu'] = repr(exc)\n"
        "print(json.dumps(facts, default=str))\n"
    )
    facts: dict[str, Any] = {}
    for name, python in (("here", sys.executable), ("torch_python", session.torch_python)):
        if python is not None:
            done = session.start(["-c", program], 300, python)
            facts[name] = json.loads(done["stdout"]) if done["ended"] == 0 else done
    query = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm",
        "--format=csv,noheader",
    ]
    try:
        facts["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as exc:
        facts["nvidia_smi"] = repr(exc)
    return facts


def _pytest(session: Session, name: str, *words: str | Path, python: str = sys.executable) -> Any:
    report = session.output / f"report-{name}.json"
    done = session.module(
        *("pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--rootdir", ROOT, "-c", ROOT / "pyproject.toml"),
        *(*words, "--device-report", report),
        limit_s=3000,
        python=python,
    )
    tail = done["stdout"].strip().splitlines()[-1:] or [done["stderr"][-500:]]
    if done["ended"] not in (0, 5) or not report.is_file():
        raise RuntimeError(f"pytest {name}: {done['ended']}: {tail[0]}; {report} says more")
    outcomes = json.loads(report.read_text())["tests"].values()
    if not any(test["outcome"] == "passed" for test in outcomes):
        reasons = sorted({str(test["said"]) for test in outcomes})
        raise RuntimeError(f"pytest {name}: no test ran: {'; '.join(reasons)[:600]}")
    return {"summary": tail[0], "seconds": done["seconds"], "report": report.name}


def cuda(session: Session) -> Any:
    """The CUDA layer, and PyTorch on the GPU, in whichever Python has it."""
    tests = ROOT / "tests" / "gpu"
    python = session.torch_python or sys.executable
    return _pytest(session, "cuda", tests / "test_device_cuda.py", tests / "test_device_pytorch.py", python=python)


def suite(session: Session) -> Any:
    """Everything in tests/gpu."""
    return _pytest(session, "suite", ROOT / "tests" / "gpu")


def questions(session: Session) -> Any:
    """What TensorRT 8 takes."""
    graphs = [str(path / "model.onnx") for path in session.portable if path.name.endswith("-int8")]
    done = session.start(
        [str(Path(__file__).with_name("questions.py")), str(session.output / "questions"), *graphs], 3000
    )
    if done["ended"] != 0:
        raise RuntimeError(f"questions: {done['ended']}: {done['stderr'][-800:]}")
    answers = json.loads((session.output / "questions" / "probe.json").read_text())
    if not any(answer.get("built") for answer in answers.values()):
        first = next(iter(answers.values()))
        raise RuntimeError(f"questions: nothing was built: {str(first.get('stderr') or first)[-400:]}")
    return answers


def compiling(session: Session) -> Any:
    """Every folder, twice."""
    results: dict[str, Any] = {}
    for folder in session.portable:
        output = session.output / "engines" / folder.name
        words = (
            "compile",
            folder,
            "--target",
            session.target,
            "--output",
            output,
            "--force",
            "--json",
            *session.options,
        )
        result: dict[str, Any] = {}
        try:
            for turn in ("first_s", "again_s"):
                begun = time.perf_counter()
                manifest = session.edgeseg(*words, limit_s=900)
                result[turn] = round(time.perf_counter() - begun, 2)
            result |= {
                name: manifest["precision"].get(name)
                for name in ("requested", "mac_share", "time_share", "float_layers")
            }
            result |= {
                "size_bytes": manifest["engine"]["size_bytes"],
                "versions": manifest["versions"],
                "device": manifest["device"],
            }
        except (RuntimeError, KeyError, ValueError) as exc:
            result["error"] = str(exc)
        results[folder.name] = result
        session.write("compile.json", results)
    return _none_failed(results)


def _none_failed(results: dict[str, Any]) -> dict[str, Any]:
    failed = [name for name, result in results.items() if "error" in result]
    if failed or not results:
        raise RuntimeError(f"{len(failed)} of {len(results)} failed: {', '.join(failed)}")
    return results


MASKS = """
import json, statistics, sys, time
from pathlib import Path
import numpy as np
from PIL import Image
from edgeseg.store.engine import open_engine
how, folder, images, output = sys.argv[1:]
engine = open_engine(Path(folder))
spec = engine.manifest.spec
if how == "engine":
    from edgeseg.backends import get_backend
    session = get_backend(engine.manifest.target).load(engine)
elif how == "graph":
    from edgeseg.backends.portable import open_graph
    session = open_graph(engine)
else:
    from edgeseg.backends.pytorch import PyTorchSession
    from edgeseg.convert.load import load_model
    from edgeseg.evaluate.contenders import baseline_request
    request, reason = baseline_request(engine.manifest, None)
    assert request is not None, reason
    loaded = load_model(request)
    assert loaded.weights_sha256 == engine.manifest.inputs_sha256["weights"], "other weights than the engine's"
    session = PyTorchSession(loaded, spec, device="cuda", exact=how == "exact", float16=how == "fp16")
size = (spec.input.width, spec.input.height)
paths = sorted(p for p in Path(images, "images").iterdir())[:16]
batches = [np.ascontiguousarray(np.asarray(Image.open(p).convert("RGB").resize(size))[None]) for p in paths]
with session:
    masks = [session.run(batch)[spec.output.kind] for batch in batches]
    until = time.perf_counter() + 1.0
    while time.perf_counter() < until:
        session.run(batches[0])
    times, until = [], time.perf_counter() + 3.0
    while time.perf_counter() < until or len(times) < 20:
        begun = time.perf_counter()
        session.run(batches[len(times) % len(batches)])
        times.append((time.perf_counter() - begun) * 1e3)
    options = dict(getattr(session, "options", {}))
np.savez_compressed(output, masks=np.concatenate(masks))
print(json.dumps({"median_ms": statistics.median(times), "samples": len(times), "options": options}, default=str))
"""


def agreement(session: Session) -> Any:
    """Masks of the engines beside PyTorch's on the GPU."""
    import numpy as np

    assert session.folders is not None
    references: dict[str, Any] = {}
    results: dict[str, Any] = {}
    (session.output / "masks").mkdir(exist_ok=True)

    def masks(how: str, folder: Path, python: str = sys.executable) -> tuple[Any, Any]:
        path = session.output / "masks" / f"{folder.name}-{how}.npz"
        done = session.start(["-c", MASKS, how, str(folder), str(session.folders / "images"), str(path)], 600, python)  # type: ignore[operator]
        if done["ended"] != 0:
            raise RuntimeError(f"{how}: {done['ended']}: {done['stderr'][-600:]}")
        return np.load(path)["masks"], json.loads(done["stdout"].strip().splitlines()[-1])

    for folder in session.compiled:
        arch = folder.name.rpartition("-")[0]
        result: dict[str, Any] = {}
        try:
            if arch not in references:
                try:
                    references[arch] = ("pytorch", *masks("exact", folder, session.torch_python or sys.executable))
                except RuntimeError as exc:
                    references[arch] = ("onnxruntime", *masks("graph", session.output / "engines" / f"{arch}-fp32"))
                    result["no_pytorch"] = str(exc)
            beside, expected, timed = references[arch]
            ours, own = masks("engine", folder)
            result |= {
                "beside": beside,
                "agreement": float((ours == expected).mean()),
                "classes": int(np.unique(expected).size),
            }
            result |= {"engine": own, "reference": timed}
        except (RuntimeError, OSError, ValueError) as exc:
            result["error"] = str(exc)
        results[folder.name] = result
        session.write("agreement.json", results)
    return _none_failed(results)


def bench(session: Session) -> Any:
    """Every architecture's engines beside PyTorch, in turns."""
    assert session.folders is not None
    results: dict[str, Any] = {}
    wanted = [word for kind in BASELINES for word in ("--baseline", kind)]
    for arch in sorted({folder.name.rpartition("-")[0] for folder in session.compiled}):
        engines = [folder for folder in session.compiled if folder.name.rpartition("-")[0] == arch]
        path = session.output / f"bench-{arch}.json"
        words: tuple[str | Path, ...] = (
            "bench",
            *engines,
            *wanted,
            "--data",
            session.folders / "images",
            "--profile",
            "--force",
            "--json",
            path,
        )
        try:
            session.edgeseg(*words, limit_s=1200)
            results[arch] = {"report": path.name}
        except RuntimeError as exc:
            results[arch] = {"error": str(exc), "report": path.name if path.is_file() else None}
        session.write("bench.json", results)
    return _none_failed(results)


def _one(session: Session) -> Path:
    chosen = [folder for folder in session.compiled if folder.name == ONE] or session.compiled
    if not chosen:
        raise RuntimeError("no engine was compiled")
    return chosen[0]


def graphs(session: Session) -> Any:
    """One engine with and without CUDA graphs, in turns."""
    folder = _one(session)
    graphed = session.output / "with-graphs" / f"{folder.name}-graphed"
    options = [*session.options, "--backend-option", "cuda_graph=true"]
    session.edgeseg("compile", folder, "--output", graphed, "--force", "--json", *options, limit_s=900)
    path = session.output / "bench-graphs.json"
    session.edgeseg("bench", folder, graphed, "--baseline", "none", "--force", "--json", path, limit_s=900)
    return {"report": path.name}


def threads(session: Session) -> Any:
    """One engine, called by several threads."""
    path = session.output / "bench-threads.json"
    words = ("--baseline", "none", "--streams", "1,2,4,8", "--force", "--json", path)
    session.edgeseg("bench", _one(session), *words, limit_s=900)
    return {"report": path.name}


SOAK = """
import gc, json, sys, time
from pathlib import Path
import numpy as np
from edgeseg.backends import get_backend
from edgeseg.evaluate.latency.fresh import resident_bytes
from edgeseg.store.engine import open_engine
engine = open_engine(Path(sys.argv[1]))
spec, count = engine.manifest.spec.input, int(sys.argv[2])
try:
    from edgeseg.backends.cuda.device import open_cuda
    cuda = open_cuda()
    free = lambda: cuda.memory_info()[0]
except Exception:
    free = lambda: None
image = np.random.default_rng(0).integers(0, 256, (1, spec.height, spec.width, spec.channels), np.uint8)
readings = []
with get_backend(engine.manifest.target).load(engine) as session:
    for number in range(count + 1):
        session.run(image)
        if number in (100, count // 2, count):
            gc.collect()
            readings.append({"run": number, "rss_bytes": resident_bytes("VmRSS"), "gpu_free_bytes": free()})
first, last = readings[0], readings[-1]
grown = {name: None if first[name] is None else abs(last[name] - first[name]) for name in ("rss_bytes", "gpu_free_bytes")}
print(json.dumps({"inferences": count, "readings": readings, "grown": grown}))
assert all(value is None or value < 16 << 20 for value in grown.values()), grown
"""


def soak(session: Session, count: int = 10_000) -> Any:
    """Many inferences without growth."""
    done = session.start(["-c", SOAK, str(_one(session)), str(count)], 1500)
    if done["ended"] != 0:
        raise RuntimeError(f"soak: {done['ended']}: {done['stdout'][-400:]} {done['stderr'][-600:]}")
    return json.loads(done["stdout"].strip().splitlines()[-1])


STEPS: dict[str, Step] = {
    "device": device,
    "cuda": cuda,
    "questions": questions,
    "suite": suite,
    "compile": compiling,
    "agreement": agreement,
    "bench": bench,
    "graphs": graphs,
    "threads": threads,
    "soak": soak,
}


def main(arguments: list[str]) -> int:
    """Run the steps; returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--folders", type=Path)
    parser.add_argument("--torch-python")
    parser.add_argument("--only", action="append", choices=STEPS)
    parser.add_argument("--option", action="append", default=[])
    parser.add_argument("--target", default="tensorrt")
    parser.add_argument("--no-external-tactics", action="store_true", help="Of a kit without cuDNN and cuBLAS.")
    session = Session(parser.parse_args(arguments))
    chosen = parser.parse_args(arguments).only or list(STEPS)
    summary_path = session.output / "summary.json"
    summary: dict[str, Any] = json.loads(summary_path.read_text()) if summary_path.is_file() else {}
    for name in ["device", *(step for step in STEPS if step in chosen and step != "device")]:
        if summary.get(name, {}).get("outcome") == "done" and name != "device":
            continue
        begun = time.perf_counter()
        try:
            result, outcome = STEPS[name](session), "done"
        except (RuntimeError, AssertionError, OSError, ValueError) as exc:
            result, outcome = str(exc), "failed"
        if name == "device" and outcome == "done":
            said = result["here"].get("cuda") if isinstance(result.get("here"), dict) else None
            session.card = said["name"] if isinstance(said, dict) else "no GPU"
        session.write(f"{name}.json", result) if outcome == "done" else None
        summary[name] = {"outcome": outcome, "seconds": round(time.perf_counter() - begun, 1)}
        if outcome == "failed":
            summary[name]["said"] = result
        summary_path.write_text(json.dumps({"card": session.card, **summary}, indent=1) + "\n")
        print(
            f"{outcome:7} {name:10} {summary[name]['seconds']:8} s  {summary[name].get('said', '')}"[:400], flush=True
        )
    return sum(1 for step in summary.values() if isinstance(step, dict) and step["outcome"] == "failed")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
