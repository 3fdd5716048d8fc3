"""NVIDIA GPUs with a driver of their own, through NVML (nvidia-ml-py): what they are, their state, memory and power.

A Jetson's GPU is not among them, or tells NVML little: :mod:`edgeseg.machine.state` reads it from sysfs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from edgeseg.machine.record import Gpu, MachineState

_GRAPHICS_CLOCK = 0
_GPU_SENSOR = 0
# nvmlClocksThrottleReason* of nvml.h; idling and clocks the user set are no reason to distrust a run.
_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


class NvmlSource:
    """Discrete NVIDIA GPUs, through nvidia-ml-py, and their power.

    Attributes:
        gpus: their handles.
    """

    name = "nvml"

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        self.gpus = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]

    def watts(self) -> Mapping[str, float]:
        """See :class:`PowerSource`."""
        by_gpu = {}
        for index, gpu in enumerate(self.gpus):
            milliwatts = _told(self._nvml, self._nvml.nvmlDeviceGetPowerUsage, gpu)
            if milliwatts is not None:
                by_gpu[f"GPU {index}"] = milliwatts / 1000
        return by_gpu

    def close(self) -> None:
        """Shut NVML down."""
        self._nvml.nvmlShutdown()


def import_nvml() -> Any:
    """The nvidia-ml-py module, ``None`` when it is not installed."""
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


@contextmanager
def _opened(nvml: Any) -> Iterator[tuple[Any, list[Any]]]:
    """The module, initialized, and a handle for each GPU; none where it is not installed or finds no driver."""
    module = nvml or import_nvml()
    try:
        source = None if module is None else NvmlSource(module)
    except module.NVMLError:
        source = None
    if source is None:
        yield None, []
        return
    try:
        yield module, source.gpus
    finally:
        source.close()


def _told(nvml: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, ``None`` where this GPU or driver has none (integrated GPUs lack most)."""
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None


def nvml_gpus(nvml: Any = None) -> tuple[Gpu, ...]:
    """NVIDIA GPUs as NVML describes them; empty without NVML or a driver."""
    described = []
    with _opened(nvml) as (module, gpus):
        for index, gpu in enumerate(gpus):
            name = _told(module, module.nvmlDeviceGetName, gpu)
            memory = _told(module, module.nvmlDeviceGetMemoryInfo, gpu)
            driver = _told(module, module.nvmlSystemGetDriverVersion)
            limit_mw = _told(module, module.nvmlDeviceGetEnforcedPowerLimit, gpu)
            described.append(
                Gpu(
                    name=_words(name) if name is not None else f"GPU {index}",
                    memory_bytes=None if memory is None else int(memory.total),
                    driver=None if driver is None else _words(driver),
                    power_limit_w=None if limit_mw is None else limit_mw / 1000,
                )
            )
    return tuple(described)


def nvml_state(nvml: Any = None) -> MachineState:
    """Clocks, temperatures and reasons for throttling of the GPUs, now; empty without NVML or a driver."""
    mhz: dict[str, float] = {}
    temperatures_c: dict[str, float] = {}
    throttled: list[str] = []
    with _opened(nvml) as (module, gpus):
        for index, gpu in enumerate(gpus):
            name = f"GPU {index}"
            clock = _told(module, module.nvmlDeviceGetClockInfo, gpu, _GRAPHICS_CLOCK)
            if clock is not None:
                mhz[name] = float(clock)
            celsius = _told(module, module.nvmlDeviceGetTemperature, gpu, _GPU_SENSOR)
            if celsius is not None:
                temperatures_c[name] = float(celsius)
            reasons = _told(module, module.nvmlDeviceGetCurrentClocksThrottleReasons, gpu) or 0
            throttled += [f"{name}: {words}" for bit, words in _REASONS.items() if reasons & bit]
    return MachineState(gpu_mhz=mhz, temperatures_c=temperatures_c, throttled=tuple(throttled))


def gpu_bytes(process_id: int, nvml: Any = None) -> int | None:
    """Memory a process holds on NVIDIA GPUs, ``None`` where NVML is not there or does not tell."""
    with _opened(nvml) as (module, gpus):
        processes = [p for gpu in gpus for p in _told(module, module.nvmlDeviceGetComputeRunningProcesses, gpu) or ()]
    used = [p.usedGpuMemory for p in processes if p.pid == process_id and p.usedGpuMemory is not None]
    return int(sum(used)) if used else None


def _words(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
