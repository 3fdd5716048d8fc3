"""Implicit INT8 for TensorRT up to 10: calibration caches from edgeseg's own table, and TensorRT's own calibration.

A cache is text: ``TRT-<version>-<algorithm>``, then a line ``<tensor>: <scale>`` each, the scale being a float32 (largest
magnitude / 127) as the hexadecimal digits of its bits, most significant first and without leading zeros. TensorRT uses
the scales as they are when the first line is its own, and calibrates anew, or fails, when it is not.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.backends.cuda.device import Cuda, open_cuda
from edgeseg.backends.tensorrt.graph import ParsedGraph
from edgeseg.backends.tensorrt.options import TensorRTOptions
from edgeseg.errors import ArtifactError, BuildError, EdgesegError, SpecError
from edgeseg.quantize.table import CalibrationTable, load_table
from edgeseg.spec import InputSpec
from edgeseg.store.files import read_bounded

if TYPE_CHECKING:
    from tensorrt_surface import TensorRT

    from edgeseg.quantize.samples import CalibrationSet

CACHE_NAME = "calibration.cache"
ENTROPY = "EntropyCalibration2"
_LIMIT = 127.0


def version_number(version: str) -> int:
    """``8.6.1`` -> 8601, ``10.3.0`` -> 100300: as TensorRT numbers itself in a cache."""
    major, minor, patch = (int(part) for part in (version.split(".") + ["0", "0"])[:3])
    return major * (10000 if major >= 10 else 1000) + minor * 100 + patch


def cache_header(version: str) -> str:
    """First line of a cache that this version reads."""
    return f"TRT-{version_number(version)}-{ENTROPY}"


def cache_text(table: CalibrationTable, version: str) -> str:
    """A calibration cache of every range in the table, in the table's order.

    Raises:
        ArtifactError: the table holds no range at all, so int8 has nothing to stand on.
    """
    if not table.ranges:
        raise ArtifactError("the calibration table holds no ranges; calibrate again")
    lines = [cache_header(version)]
    # The bits of a float32 as hexadecimal digits, without zeros in front: 1.0 is 3f800000.
    scales = {name: struct.pack(">f", chosen.magnitude / _LIMIT) for name, chosen in table.ranges.items()}
    lines += [f"{name}: {int.from_bytes(bits, 'big'):x}" for name, bits in scales.items()]
    return "\n".join(lines) + "\n"


def read_cache(text: str) -> tuple[str, dict[str, float]]:
    """Header and scales of a cache.

    Raises:
        ArtifactError: not a calibration cache, a tensor twice, or a scale that is not a positive finite number.
    """
    header, _, body = text.partition("\n")
    if not header.startswith("TRT-"):
        raise ArtifactError(f"not a TensorRT calibration cache: it begins with {header[:40]!r}; calibrate again")
    scales: dict[str, float] = {}
    for line in body.splitlines():
        if not line.strip():
            continue
        name, separator, digits = line.rpartition(": ")
        try:
            scale = struct.unpack(">f", int(digits, 16).to_bytes(4, "big"))[0]
        except (ValueError, OverflowError):
            scale = float("nan")
        if not separator or name in scales or not (np.isfinite(scale) and scale >= 0):
            raise ArtifactError(f"the calibration cache is damaged at {line[:80]!r}; calibrate again")
        scales[name] = scale
    return header, scales


def check_cache(path: Path, version: str, tensors: Collection[str], table: CalibrationTable | None) -> bytes:
    """Read a cache someone gives and refuse one that is not for this TensorRT, this graph and this table.

    Args:
        path: the cache file.
        version: of TensorRT here.
        tensors: names of the graph's values.
        table: the folder's calibration table, if it has one: the scales must be its own.

    Returns:
        the file's bytes.

    Raises:
        ArtifactError: unreadable, damaged, or written for something else; says what.
    """
    data = read_bounded(path, "calibration cache", ArtifactError)
    try:
        header, scales = read_cache(data.decode())
    except UnicodeDecodeError as exc:
        raise ArtifactError(f"cannot read calibration cache {path}: {exc}; give a TensorRT calibration cache") from exc
    if header.rpartition("-")[0] != cache_header(version).rpartition("-")[0]:
        raise ArtifactError(
            f"calibration cache {path} is of another TensorRT ({header}, this one reads {cache_header(version)}); "
            "leave calibration_cache out to write one from the calibration table"
        )
    known = set(tensors)
    foreign = [name for name in scales if name not in known and not name.startswith("(Unnamed Layer")]
    if not scales or foreign:
        named = f"it speaks of {foreign[0]!r}, which the graph does not have" if foreign else "it holds no scales"
        raise ArtifactError(f"calibration cache {path} is of another model: {named}; calibrate this one")
    if table is not None:
        wanted = read_cache(cache_text(table, version))[1]
        differing = [name for name in wanted if name in scales and scales[name] != wanted[name]]
        if differing:
            raise ArtifactError(
                f"calibration cache {path} is stale: {len(differing)} of its scales, such as that of {differing[0]!r}, are "
                "not those of the folder's calibration table; leave calibration_cache out to write a new one"
            )
    return data


class ImageFeed:
    """Calibration images in device memory, a batch at a time, for a calibrator's ``get_batch``.

    An exception inside TensorRT's callback would be lost: the first one is kept in ``failure``, and the images end.
    """

    def __init__(self, samples: CalibrationSet, spec: InputSpec, cuda: Cuda) -> None:
        self.batch_size = spec.batch.optimum
        self.batches = 0
        self.failure: EdgesegError | None = None
        self._batches = _batches(samples, spec)
        self._cuda = cuda
        # TensorRT has no uint16; float32 holds its values.
        self._dtype = np.dtype("float32" if spec.dtype == "uint16" else spec.dtype)
        size_bytes = self.batch_size * spec.height * spec.width * spec.channels * self._dtype.itemsize
        self._memory = cuda.device_memory(size_bytes)
        self._stream = cuda.stream()

    def next_address(self) -> int | None:
        """Copy the next batch to the device and return where it is; ``None`` after the last one."""
        try:
            batch = next(self._batches, None)
            if batch is None:
                return None
            # TensorRT calls from a thread of its choice, which need not have the GPU's context.
            with self._cuda.active():
                self._stream.copy_to_device(self._memory.address, batch.astype(self._dtype).reshape(-1).view(np.uint8))
                self._stream.synchronize()
        except EdgesegError as exc:
            self.failure = exc
            return None
        self.batches += 1
        return int(self._memory.address)

    def close(self) -> None:
        """Free the device memory and the stream."""
        self._stream.close()
        self._memory.close()


def make_calibrator(trt: TensorRT, algorithm: str, cache: bytes, feed: ImageFeed | None) -> Any:
    """A calibrator that has the answer already, in ``cache``, or lets TensorRT measure on images.

    Args:
        trt: the TensorRT module, up to 10.
        algorithm: ``minmax``, or ``entropy``, whose caches edgeseg writes.
        cache: a calibration cache; ``b""`` to measure.
        feed: the images to measure on.

    Returns:
        the calibrator; its ``written`` is the cache TensorRT made, ``b""`` before, ``asked_for_images`` whether it did.
    """
    if TYPE_CHECKING:
        # What it overrides is the same of the other one.
        from tensorrt import IInt8EntropyCalibrator2 as Base
    else:
        Base = trt.IInt8MinMaxCalibrator if algorithm == "minmax" else trt.IInt8EntropyCalibrator2  # noqa: N806

    class Calibrator(Base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.asked_for_images = False
            self.written = b""

        def get_batch_size(self) -> int:
            return 1 if feed is None else feed.batch_size

        def get_batch(self, names: list[str]) -> list[int] | None:
            # Where TensorRT does not take the cache, it gets no batch either, and its build fails, as it should.
            self.asked_for_images = True
            address = None if feed is None else feed.next_address()
            return None if address is None else [address]

        def read_calibration_cache(self) -> bytes | None:
            return cache or None

        def write_calibration_cache(self, cache: Any) -> None:
            self.written = bytes(cache)

    return Calibrator()


def _batches(samples: CalibrationSet, spec: InputSpec) -> Iterator[NDArray[Any]]:
    """Full batches ``(N, H, W, C)`` at the engine's own size; a last one that is not full is left out."""
    pending: list[NDArray[Any]] = []
    for window in samples.images(spec):
        if window.shape[1:3] != (spec.height, spec.width):
            continue  # a dynamic size's own: the calibration profile has the engine's size only
        pending.append(window)
        if len(pending) == spec.batch.optimum:
            yield np.ascontiguousarray(np.concatenate(pending))
            pending = []


TABLE_NAME = "calibration.json"


@dataclass
class Ranges:
    """A calibrator for one build.

    Attributes:
        calibrator: to set as ``int8_calibrator``; must live as long as the build.
        cache: the calibration cache; ``b""`` until TensorRT has measured.
    """

    calibrator: Any
    cache: bytes = b""
    feed: ImageFeed | None = None
    cuda: Cuda | None = None

    @classmethod
    def choose(cls, trt: TensorRT, options: TensorRTOptions, parsed: ParsedGraph, folder: Path) -> Ranges:
        """From a cache that was given, from the calibration table beside the graph, or by measuring on images.

        Raises:
            ArtifactError: a cache or table that is damaged, stale or foreign.
            SpecError: no table to take the ranges from.
            InputError, DeviceError: images that cannot be used; no device memory.
        """
        version = str(trt.__version__)
        if options.calibrator != "table":
            from edgeseg.quantize.samples import CalibrationSet

            assert options.calibration_images is not None  # TensorRTOptions checks
            spec = parsed.spec.input
            samples = CalibrationSet.open(options.calibration_images, channels=spec.channels, dtype=spec.dtype)
            cuda = open_cuda()
            try:
                feed = ImageFeed(samples, spec, cuda)
            except BaseException:
                cuda.close()
                raise
            return cls(make_calibrator(trt, options.calibrator, b"", feed), feed=feed, cuda=cuda)
        table = _table_beside(parsed.path, folder)
        if options.calibration_cache is not None:
            cache = check_cache(Path(options.calibration_cache), version, parsed.tensors, table)
        elif table is not None:
            cache = cache_text(table, version).encode()
        else:
            raise SpecError(
                f"implicit calibration has no {TABLE_NAME} beside the graph; "
                "give calibration_cache=FILE, or calibrator=entropy and calibration_images=DIR"
            )
        return cls(make_calibrator(trt, "entropy", cache, None), cache)

    def finish(self, folder: Path) -> tuple[Path, ...]:
        """After the build: check that the ranges were used, and leave them in the folder as a calibration cache.

        Raises:
            BuildError: TensorRT did not take the cache, or calibration failed.
        """
        if self.feed is not None:
            if self.feed.failure is not None:
                raise BuildError(
                    f"calibration stopped after {self.feed.batches} batches: {self.feed.failure}"
                ) from self.feed.failure
            if self.feed.batches == 0:
                raise BuildError("TensorRT asked for no calibration images; its int8 ranges would mean nothing")
            self.cache = self.calibrator.written
        elif self.calibrator.asked_for_images:
            raise BuildError("TensorRT did not take the calibration cache and asked for images; nothing was calibrated")
        if not self.cache:
            return ()
        path = folder / CACHE_NAME
        path.write_bytes(self.cache)
        return (path,)

    def close(self) -> None:
        """Free what the images took on the device."""
        if self.feed is not None:
            self.feed.close()
        if self.cuda is not None:
            self.cuda.close()


def _table_beside(graph: Path, folder: Path) -> CalibrationTable | None:
    for place in (graph.parent, folder):
        if (place / TABLE_NAME).is_file():
            return load_table(place / TABLE_NAME)
    return None
