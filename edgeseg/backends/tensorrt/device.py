"""The GPU TensorRT would use, and whether an engine was built for it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from edgeseg.backends.cuda.device import Cuda, open_cuda
from edgeseg.backends.cuda.driver import CudaDevice
from edgeseg.errors import DeviceError, StaleEngineError, typed
from edgeseg.store.engine import Engine

T = TypeVar("T")


def on_gpu(make: Callable[[Cuda], T]) -> T:
    """What ``make`` makes of the first GPU, which is closed when that fails, after the TensorRT objects it made.

    Destroying them takes the CUDA context, and they live in the frames of the exception.

    Raises:
        MissingDependencyError, DeviceError: see :func:`~edgeseg.backends.cuda.device.open_cuda`.
    """
    cuda = open_cuda()
    try:
        return make(cuda)
    except BaseException as exc:
        with suppress(DeviceError), cuda.active():
            traceback.clear_frames(exc.__traceback__)
        cuda.close()
        raise


def find_gpu() -> CudaDevice:
    """The first GPU visible to this process. Raises ``MissingDependencyError``, ``DeviceError``."""
    with open_cuda() as cuda:
        return cuda.device


def check_built_for(engine: Engine, package: str, version: str, gpu: CudaDevice) -> None:
    """Raise ``StaleEngineError`` unless a plan can be deserialized here.

    Args:
        engine: the folder; its manifest says what the plan was built with and for, and how portable it was made.
        package: ``tensorrt`` or ``tensorrt-rtx``.
        version: of the package here.
        gpu: the GPU here.
    """
    manifest = engine.manifest
    built_with, built_on = manifest.versions.get(package, "?"), manifest.device.get("gpu", "?")
    capability = manifest.device.get("compute_capability", "?")
    level = manifest.options.get("hardware_compatibility", "none")
    if manifest.options.get("version_compatible"):
        # Runs in later TensorRTs of the same major: what "version compatible" promises.
        same_version = _numbers(version)[:1] == _numbers(built_with)[:1] and _numbers(version) >= _numbers(built_with)
    else:
        same_version = built_with == version
    same_capability = capability == gpu.capability_text
    same_device = {
        "none": same_capability and built_on == gpu.name,
        "same_compute_capability": same_capability,
        "ampere_plus": gpu.compute_capability >= (8, 0),
    }.get(level, False)
    if not same_version or not same_device:
        raise StaleEngineError(
            f"{engine.folder} was built with {package} {built_with} for {built_on} (compute capability {capability}), this "
            f"is {package} {version} on {gpu.name} ({gpu.capability_text}); run: {typed('compile', engine.folder)}"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
