"""NVIDIA Model Optimizer's ONNX quantization (INT8, entropy: its defaults), run in ONNX Runtime; numpy before and after.

It needs other versions of onnx and ONNX Runtime than edgeseg. So it quantizes in an environment of its own, as a
command, and only the finished Q/DQ graph comes back, to run in the ONNX Runtime that its siblings run in.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.peers import Contender, NotInstalledError
from benchmarks.peers.onnxruntime_static import session_contender
from benchmarks.peers.plain_onnx import export
from benchmarks.workload import Workload

# What `make modelopt` makes.
ENVIRONMENT = Path(__file__).resolve().parents[2] / ".venv-modelopt"
PACKAGE = "nvidia-modelopt"
OPTIONS = {
    "quantize_mode": "int8",
    "calibration_method": "entropy",
    # The default tries CUDA and TensorRT as well.
    "calibration_eps": "cpu",
    # The default, fp16, is meant for GPUs: a CPU would convert to float32 and back around every operator.
    "high_precision_dtype": "fp32",
}


def prepare(work: Workload, folder: Path) -> Contender:
    python, folder = interpreter(), folder.resolve()
    plain, images, quantized = export(work, folder), folder / "calibration.npy", folder / "modelopt.onnx"
    np.save(images, np.concatenate([work.normalized(image) for image in work.calibration]))
    options = [text for name, value in OPTIONS.items() for text in (f"--{name}", value)]
    run(
        [python, "-m", "modelopt.onnx.quantization", "--onnx_path", str(plain), "--output_path", str(quantized)]
        + ["--calibration_data_path", str(images), *options],
        folder,
    )
    images.unlink()
    contender = session_contender(work, quantized, {**OPTIONS, "calibration_images": len(work.calibration)})
    asked = f"from importlib.metadata import version; print(version({PACKAGE!r}))"
    return replace(contender, versions={PACKAGE: run([python, "-c", asked], folder).strip()})


def interpreter() -> str:
    """The Python that has Model Optimizer: of ``EDGESEG_MODELOPT``, else of ``make modelopt``.

    Raises:
        NotInstalledError: there is none.
    """
    root = Path(os.environ.get("EDGESEG_MODELOPT") or ENVIRONMENT)
    python = root / "bin" / "python"
    if not python.is_file():
        raise NotInstalledError(
            f"no environment of Model Optimizer in {root.name}; make modelopt makes one, or set EDGESEG_MODELOPT to yours"
        )
    return str(python)


def run(command: list[str], folder: Path) -> str:
    """Run in ``folder`` and return what is printed; the end of its log becomes the error when it fails."""
    # Ours would hide its own packages.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise RuntimeError(f"Model Optimizer ended with {done.returncode}: {' '.join(said[-3:])}")
    return done.stdout
