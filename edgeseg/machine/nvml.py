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
    """Power of discrete NVIDIA GPUs, through nvidia-ml-py."""

    name = "nvml"

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        self._gpus = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]

    def watts(self) -> Mapping[str, float]:
        """See :class:`PowerSource`."""
        by_gpu = {}
        for index, gpu in enumerate(self._gpus):
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
def _opened(nvml: Any) -> Iterator[Any]:
    """The module, initialized; ``None`` where it is not installed or finds no driver."""
    module = nvml or import_nvml()
    if module is not None:
        try:
            module.nvmlInit()
        except module.NVMLError:
            module = None
    try:
        yield module
    finally:
        if module is not None:
            module.nvmlShutdown()


def _told(nvml: Any, question: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, ``None`` where this GPU or driver has none (integrated GPUs lack most)."""
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None


def nvml_gpus(nvml: Any = None) -> tuple[Gpu, ...]:
    """NVIDIA GPUs as NVML describes them; empty without NVML or a driver."""
    with _opened(nvml) as module:
        if module is None:
            return ()
        driver = _told(module, module.nvmlSystemGetDriverVersion)
        gpus = []
        for index in range(module.nvmlDeviceGetCount()):
            gpu = module.nvmlDeviceGetHandleByIndex(index)
            name = _told(module, module.nvmlDeviceGetName, gpu)
            memory = _told(module, module.nvmlDeviceGetMemoryInfo, gpu)
            limit_mw = _told(module, module.nvmlDeviceGetEnforcedPowerLimit, gpu)
            gpus.append(
                Gpu(
                    name=_words(name) if name is not None else f"GPU {index}",
                    memory_bytes=None if memory is None else int(memory.total),
                    driver=None if driver is None else _words(driver),
                    power_limit_w=None if limit_mw is None else limit_mw / 1000,
                )
            )
        return tuple(gpus)


def nvml_state(nvml: Any = None) -> MachineState:
    """Clocks, temperatures and reasons for throttling of the GPUs, now; empty without NVML or a driver."""
    with _opened(nvml) as module:
        if module is None:
            return MachineState()
        mhz: dict[str, float] = {}
        temperatures_c: dict[str, float] = {}
        throttled: list[str] = []
        for index in range(module.nvmlDeviceGetCount()):
            gpu, name = module.nvmlDeviceGetHandleByIndex(index), f"GPU {index}"
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
    with _opened(nvml) as module:
        if module is None:
            return None
        used: int | None = None
        for index in range(module.nvmlDeviceGetCount()):
            gpu = module.nvmlDeviceGetHandleByIndex(index)
            for process in _told(module, module.nvmlDeviceGetComputeRunningProcesses, gpu) or ():
                if process.pid == process_id and process.usedGpuMemory is not None:
                    used = (used or 0) + int(process.usedGpuMemory)
        return used


def _words(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
