"""INT8 on x86 CPUs without VNNI: neighbouring weights kept small enough, beside 7 bits for all of them, and 8 bits with VNNI.

    python -m benchmarks.without_vnni [--folder /tmp/hard]

Such CPUs add two products in 16 bits. The usual answer is 7 bits for all weights (ONNX Runtime's ``reduce_range``); edgeseg's
schemes scale a channel by the largest sum of two neighbours. Graphs run in ONNX Runtime as they are written, optimizations off;
``make avx2`` shows that AVX2's kernels make the same masks. ``--folder`` adds the networks of :mod:`benchmarks.hard_networks`
trained there. Agreement is with the float graph's masks; intervals (95 %) resample images.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from benchmarks.range_methods import confusion, masks_of, miou
from benchmarks.weight_rounding import record_each, weighted_mean
from benchmarks.workload import Workload
from edgeseg.convert.export import export_onnx
from edgeseg.evaluate.intervals import interval
from edgeseg.quantize import parameters
from edgeseg.quantize.calibration import AUTO
from edgeseg.quantize.qdq import write_qdq
from edgeseg.quantize.repair.repaired import calibrate_repaired
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.quantize.schemes import SCHEMES, QuantScheme

SCHEME = "onnxruntime-avx2"


def any_two(weight: NDArray[Any], axis: int, scheme: QuantScheme, *, groups: int = 1) -> NDArray[Any]:
    """In place of :func:`edgeseg.quantize.parameters.pair_sums`: any two weights are neighbours, so all have 7 bits."""
    values = np.abs(weight.astype(np.result_type(weight.dtype, np.int32)))
    return np.asarray(2 * values.max(axis=tuple(other for other in range(weight.ndim) if other != axis)))


def main() -> None:
    record_each(
        "without_vnni",
        "INT8 for ONNX Runtime without VNNI; Q/DQ graphs executed in ONNX Runtime, optimizations off",
        __doc__,
        measure,
    )


def measure(work: Workload, folder: Path) -> dict[str, Any]:
    graph, _ = export_onnx(work.loaded, work.spec, folder / "fp32.onnx")
    reference = masks_of(graph, work.images)
    truth = float(miou(confusion(reference, work).sum(axis=0)))
    samples = CalibrationSet.open(work.calibration)
    calibrated, table = calibrate_repaired(graph, samples, folder / "equalized.onnx", judges=(SCHEME,), method=AUTO)
    agreements = []
    row: dict[str, Any] = {"name": work.name, "miou_float": truth}
    ways = {
        "7_bits": (SCHEME, any_two),
        "neighbours": (SCHEME, parameters.pair_sums),
        "8_bits": ("onnxruntime-vnni", parameters.pair_sums),
    }
    for way, (scheme, sums) in ways.items():
        with mock.patch.object(parameters, "pair_sums", sums):
            written = write_qdq(calibrated, table, SCHEMES[scheme], folder / "int8.onnx")
        masks = masks_of(written, work.images)
        agreements.append(np.array([(a == b).mean() for a, b in zip(masks, reference, strict=True)]))
        row[f"agreement_{way}"] = float(agreements[-1].mean())
        row[f"miou_drop_{way}"] = truth - float(miou(confusion(masks, work).sum(axis=0)))
    gain = agreements[1] - agreements[0]
    row["agreement_gain"] = interval(len(gain), partial(weighted_mean, gain))
    return row


if __name__ == "__main__":
    main()
