"""Where the int8 ranges of an implicitly quantized engine come from, and what is left of them in the engine folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeseg.backends.cuda.device import Cuda, open_cuda
from edgeseg.backends.tensorrt.calibration import (
    CACHE_NAME,
    ImageFeed,
    cache_text,
    check_cache,
    make_calibrator,
    require_measured,
)
from edgeseg.backends.tensorrt.graph import ParsedGraph
from edgeseg.backends.tensorrt.options import TensorRTOptions
from edgeseg.errors import BuildError, SpecError
from edgeseg.quantize.table import CalibrationTable, load_table

if TYPE_CHECKING:
    from tensorrt_surface import TensorRT

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
            require_measured(self.feed)
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
