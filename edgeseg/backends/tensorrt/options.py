"""Build options of the TensorRT backends: what can be set, checked before any work is done, recorded in the manifest."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from edgeseg.arguments import FLAG, Kind, argument, choice, settle, whole
from edgeseg.backends.base import require_known
from edgeseg.errors import SpecError
from edgeseg.spec import InputSpec

Shape = tuple[int, int, int, int]
Options = TypeVar("Options", bound="BuilderOptions")
HostMemoryMode: TypeAlias = Literal["auto", "copy", "mapped"]

RTX_SMS = (75, 80, 86, 89, 120, 121)


def _whole(low: int, high: int, wanted: str) -> Kind:
    return dataclasses.replace(whole(low, high, low), wanted=wanted)


def _path(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError
    return os.path.abspath(value)


def _flag_or_path(value: Any) -> bool | str:
    return value if isinstance(value, bool) else _path(value)


def _size(value: Any) -> str:
    if re.fullmatch(r"[1-9]\d*x[1-9]\d*", value) is None:
        raise ValueError
    return str(value)


def _words(value: Any) -> tuple[str, ...]:
    words = value.split(",") if isinstance(value, str) else list(value)
    if not words:
        raise ValueError
    return tuple(str(word).strip().upper() for word in words)


def _sms(value: Any) -> tuple[int, ...]:
    numbers = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else list(value)
    return tuple(int(number) for number in numbers)


_MIB = _whole(1, 1 << 20, "MiB, from 1")
_SIZE = Kind("HEIGHTxWIDTH in pixels, such as 256x320", _size)


@dataclass(frozen=True)
class BuilderOptions:
    """What can be asked of both products; ``None`` leaves a setting to them.

    Attributes:
        workspace_mb: most scratch memory a layer may use, MiB.
        tf32: float32 layers may multiply in TF32 on GPUs that have it; TensorRT's own default.
        strip_weights: leave the weights out of the engine; they are put back from the graph when it is loaded.
        refit: weights can be replaced in the built engine.
        min_size, max_size: ``HxW``, bounds of an engine of dynamic size; default half and double its size.
    """

    workspace_mb: int | None = argument(_MIB)
    tf32: bool = argument(FLAG, True)
    strip_weights: bool = argument(FLAG, False)
    refit: bool = argument(FLAG, False)
    min_size: str | None = argument(_SIZE)
    max_size: str | None = argument(_SIZE)

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class SessionOptions:
    """How a loaded engine runs.

    Attributes:
        contexts: batches in flight at most, each with an execution context and buffers; further callers wait.
        cuda_graph: launch repeated shapes as a CUDA graph; needs ``cuda-bindings``.
        host_memory: ``copy`` to the GPU's memory and back; ``mapped``: the GPU uses host memory in place; ``auto``: the
            latter where GPU and CPU share their memory (Jetson).
    """

    contexts: int = argument(_whole(1, 64, "a number from 1 to 64"), 2)
    cuda_graph: bool = argument(FLAG, False)
    host_memory: HostMemoryMode = argument(choice(get_args(HostMemoryMode)), "auto")

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class TensorRTOptions(SessionOptions, BuilderOptions):
    """Settings of one TensorRT build; ``None`` leaves a setting to TensorRT.

    Attributes:
        timing_cache: keep measured kernel times between builds on this device (``true``), in the file named, or not.
        typing: ``strong``: layers compute in the graph's types (TensorRT 10 on); ``weak``: TensorRT may choose among
            the precisions allowed; ``auto``: strong where there is a choice.
        allow_fp16: with weak typing, the float layers of an int8 engine may run in fp16.
        hardware_compatibility: ``ampere_plus`` or ``same_compute_capability`` engines load on other GPUs too, slower. Not
            on a Jetson, says TensorRT.
        version_compatible: the engine loads in later TensorRT versions of the same major too; larger.
        optimization_level: 0 (fast build) to 5 (fast engine).
        aux_streams: most streams one inference may use beside its own; 0 for none.
        tactic_sources: libraries kernels may come from, such as ``["JIT_CONVOLUTIONS"]``.
        dla_core: run on this DLA, with the GPU for what it cannot.
        profiling_verbosity: ``detailed`` is what the proof of precision reads.
        prove_precision: fail when the inspector does not show the precision asked for; without it the share is recorded
            only, for a TensorRT whose inspector names its layers in a way edgeseg does not know.
        implicit_calibration: int8 from calibrated ranges instead of Q/DQ (TensorRT up to 10; DLA before 11.4).
        calibrator: where the ranges come from: ``table``, edgeseg's own; ``entropy`` or ``minmax``: TensorRT measures.
        calibration_images: what ``entropy`` and ``minmax`` measure on.
        calibration_cache: a TensorRT calibration cache to use as it is.
        layer_times: run the new engine a few times with TensorRT's profiler: the share of time per dtype, in the manifest.
    """

    timing_cache: bool | str = argument(Kind("true, false or a file", _flag_or_path), True)
    typing: str = argument(choice(("auto", "strong", "weak")), "auto")
    allow_fp16: bool = argument(FLAG, True)
    hardware_compatibility: str = argument(choice(("none", "ampere_plus", "same_compute_capability")), "none")
    version_compatible: bool = argument(FLAG, False)
    optimization_level: int | None = argument(_whole(0, 5, "a number from 0 to 5"))
    aux_streams: int | None = argument(_whole(0, 64, "a number from 0 to 64"))
    tactic_sources: tuple[str, ...] | None = argument(
        Kind("names separated by commas, such as JIT_CONVOLUTIONS", _words)
    )
    dla_core: int | None = argument(_whole(0, 15, "the number of a DLA core, from 0"))
    profiling_verbosity: str = argument(choice(("detailed", "layer_names_only", "none")), "detailed")
    prove_precision: bool = argument(FLAG, True)
    implicit_calibration: bool = argument(FLAG, False)
    calibrator: str = argument(choice(("table", "entropy", "minmax")), "table")
    calibration_images: str | None = argument(Kind("a folder, glob or list of images", _path))
    calibration_cache: str | None = argument(Kind("a calibration cache file", _path))
    layer_times: bool = argument(FLAG, True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibrator != "table" and self.calibration_images is None:
            raise SpecError(f"calibrator {self.calibrator} measures on images; give calibration_images=DIR too")
        explicit = [name for name in ("calibration_images", "calibration_cache") if getattr(self, name) is not None]
        if not self.implicit_calibration and (explicit or self.calibrator != "table"):
            named = explicit[0] if explicit else "calibrator"
            raise SpecError(f"{named} is of use with implicit_calibration=true only; give both or neither")
        if self.calibration_cache is not None and self.calibrator != "table":
            raise SpecError("calibration_cache is used as it is; leave calibrator out")
        if self.implicit_calibration and self.typing == "strong":
            raise SpecError("implicit calibration needs weak typing: leave typing out")


@dataclass(frozen=True)
class RtxOptions(BuilderOptions):
    """Settings of one TensorRT-RTX build.

    Attributes:
        sm: compute capabilities the engine is for, times ten: 86 is SM 8.6. Several go into one engine file.
        runtime_cache: keep kernels compiled when the engine is first loaded on a GPU for the next time.
    """

    sm: tuple[int, ...] = argument(Kind("numbers such as 86,89", _sms), ())
    runtime_cache: bool = argument(FLAG, True)

    def __post_init__(self) -> None:
        super().__post_init__()
        listed = ", ".join(str(sm) for sm in RTX_SMS)
        for sm in self.sm:
            if sm not in RTX_SMS:
                raise SpecError(f"TensorRT-RTX has no SM {sm} (allowed: {listed}); Jetsons take --target tensorrt")
        if len(set(self.sm)) != len(self.sm):
            raise SpecError(f"SM {', '.join(map(str, self.sm))} names one twice; name each once")


def parse_options(kind: type[Options], backend: str, options: Mapping[str, Any]) -> Options:
    """Check options as they came from the command line or a manifest.

    Raises:
        SpecError: an unknown name, a value of another type or out of range; says what is allowed.
    """
    require_known(backend, options, tuple(f.name for f in dataclasses.fields(kind)))
    return kind(**options)


def profile_shapes(spec: InputSpec, min_size: str | None, max_size: str | None) -> tuple[Shape, Shape, Shape] | None:
    """Smallest, best and largest shape of the image input, or ``None`` for a static one.

    Args:
        spec: the engine's input.
        min_size: ``HxW``; default half the engine's size, or the spec's own where that is larger.
        max_size: the same; default double.

    Raises:
        SpecError: a bound that is no multiple of the stride or on the wrong side of the engine's size, or bounds for an
            engine of static size.
    """
    if not spec.dynamic_size and (min_size or max_size):
        raise SpecError("min_size and max_size are for engines of dynamic size; build with --dynamic-size")
    if not spec.dynamic_size and not spec.batch.is_dynamic:
        return None
    least = most = best = (spec.height, spec.width)
    if spec.dynamic_size:
        step = spec.stride
        # The spec's bounds need not be multiples of the stride; an engine's shapes are.
        own = spec.min_size or (1, 1)
        halves = (spec.height // 2, spec.width // 2)
        small = tuple(-(-max(sides) // step) * step for sides in zip(own, halves, strict=True))
        large = tuple(side // step * step for side in spec.max_size or (2 * spec.height, 2 * spec.width))
        least = _bound("min_size", min_size, (small[0], small[1]), spec)
        most = _bound("max_size", max_size, (large[0], large[1]), spec)
        if not all(a <= b <= c for a, b, c in zip(least, best, most, strict=True)):
            raise SpecError(
                f"sizes {_x(least)} to {_x(most)} do not hold the engine's own {_x(best)}; widen min_size and max_size"
            )
    batch = spec.batch
    return (
        (batch.minimum, *least, spec.channels),
        (batch.optimum, *best, spec.channels),
        (batch.maximum, *most, spec.channels),
    )


def _bound(name: str, given: str | None, default: tuple[int, int], spec: InputSpec) -> tuple[int, int]:
    height, width = (int(side) for side in given.split("x")) if given else default
    if height % spec.stride or width % spec.stride:
        raise SpecError(f"{name} {height}x{width} does not fit: this model needs multiples of {spec.stride}")
    return height, width


def _x(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
