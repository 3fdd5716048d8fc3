"""``edgeseg build --max-drop`` beside NNCF's ``quantize_with_accuracy_control``: same network, images and goal.

Both quantize with the same calibration images and may look at the same labelled images; both leave parts in float until the
mIoU on those is at most ``--max-drop`` below the float network's. Compared are the mIoU of what each delivers, on those
images, through its own runtime, milliseconds in turns, and what the search took. The networks are demo models made badly scaled
(:mod:`benchmarks.badly_scaled`: the float network computes the same, plain INT8 loses 31 points of mIoU), and where
``--folder`` holds weights of :mod:`benchmarks.hard_networks`, those. Needs ``requirements-peers.txt``.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import onnx
import onnxruntime
import openvino as ov
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

import edgeseg
from benchmarks import hard_networks
from benchmarks.badly_scaled import scaled_badly
from benchmarks.peers import Contender
from benchmarks.peers.nncf_openvino import with_processing
from benchmarks.peers.onnxruntime_static import argmax, session_contender
from benchmarks.peers.plain_onnx import INPUT, export
from benchmarks.peers.pytorch_eager import contender as pytorch_contender
from benchmarks.range_methods import confusion, miou
from benchmarks.record import RESULTS, Record, ratios, this_machine, versions
from benchmarks.workload import Workload, demo
from edgeseg.convert.load import wrap_module
from edgeseg.demo import demo_models, sample_folder
from edgeseg.evaluate.latency.protocol import LatencyProtocol, measure_interleaved
from edgeseg.spec import ModelRequest

Logits = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Of an image, ``(C, H, W)``."""
Pair = tuple[NDArray[np.uint8], NDArray[np.int32]]


def main() -> None:
    options = arguments()
    console, machine = Console(), this_machine()
    rows: list[dict[str, Any]] = []
    speeds: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.names:
            work = workload(name, options.folder)
            for runtime in ("onnxruntime", "openvino"):
                measured, speed = measure(work, runtime, Path(scratch), options)
                rows += measured
                speeds.setdefault("nncf", {})[f"edgeseg, {work.name}, {runtime}"] = speed
                console.print(table(measured))
                Record(
                    benchmark="accuracy_control",
                    workload=f"goal: at most {options.max_drop} mIoU lost on the demo's validation scenes",
                    machine=machine,
                    versions=versions(),
                    settings={key: value for key, value in vars(options).items() if key not in ("folder", "output")},
                    rows=rows,
                    ratios=speeds,
                ).write(options.output)


def workload(name: str, folder: Path | None) -> Workload:
    """``fpn`` and the like: a demo model made badly scaled; ``hard segformer``: a network of ``folder``."""
    if name in demo_models():
        work = demo(name)
        module, preprocess, named = scaled_badly(work.loaded.module), work.loaded.preprocess, f"badly scaled {name}"
    else:
        assert folder is not None
        work, preprocess, named = demo("fpn"), None, name
        module = hard_networks.trained(name.removeprefix("hard "), folder)
    mean, std = (hard_networks.train_demo.MEAN, hard_networks.train_demo.STD)
    if preprocess is not None:
        mean, std = preprocess.mean, preprocess.std
    loaded = wrap_module(module, ModelRequest(mean=mean, std=std))
    spec = replace(work.spec, model=loaded.model, preprocess=loaded.preprocess)
    return replace(work, name=named, loaded=loaded, spec=replace(spec, input=replace(spec.input, stride=loaded.stride)))


def measure(
    work: Workload, runtime: str, scratch: Path, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each of PyTorch, NNCF and edgeseg; how much faster edgeseg's engine is than NNCF's."""
    makers: dict[str, Callable[[Workload, Path, float], Contender]] = {
        "nncf": nncf_onnxruntime if runtime == "onnxruntime" else nncf_openvino,
        "edgeseg": functools.partial(edgeseg_contender, runtime=runtime),
    }
    contenders = {"pytorch": pytorch_contender(work)}
    rows: list[dict[str, Any]] = [{"name": f"{work.name}, {runtime}, pytorch"}]
    for who, make in makers.items():
        folder = scratch / f"{work.name}-{runtime}-{who}"
        folder.mkdir()
        wall, cpu = time.perf_counter(), time.process_time()
        contenders[who] = make(work, folder, options.max_drop)
        took = {"build_s": time.perf_counter() - wall, "build_cpu_s": time.process_time() - cpu}
        rows.append({"name": f"{work.name}, {runtime}, {who}", **took, "settings": contenders[who].settings})
    protocol = LatencyProtocol(warmup_ms=300.0, min_duration_ms=6000.0, min_iterations=100)
    timed = {who: functools.partial(contenders[who].call, work.images[0]) for who in makers}
    samples = measure_interleaved(timed, protocol)
    for row, (who, contender) in zip(rows, contenders.items(), strict=True):
        matrices = confusion([contender.call(image) for image in work.images], work)
        row["miou"] = float(miou(matrices.sum(axis=0)))
        row["miou_drop"] = rows[0]["miou"] - row["miou"]
        if who in samples:
            row["latency"] = asdict(samples[who].figures())
            row["samples_ms"] = [round(ms, 4) for ms in samples[who].samples_ms]
    return rows, ratios(samples, ("nncf",))["nncf"]["edgeseg"]


def edgeseg_contender(work: Workload, folder: Path, max_drop: float, *, runtime: str) -> Contender:
    size, root = work.spec.input, sample_folder()
    engine = edgeseg.build(
        work.loaded.module,
        mean=work.spec.preprocess.mean,
        std=work.spec.preprocess.std,
        size=(size.height, size.width),
        calibration=root / "calib" / "images",
        validation=root / "val",
        max_drop=max_drop,
        min_int8_share=0.0,
        target=runtime,
        output=folder / "engine",
    )
    search = engine.manifest.search
    settings = {
        "mac_share": engine.manifest.precision.mac_share,
        "float_modules": [] if search is None else list(search.float_modules),
    }
    return Contender(edgeseg.load(engine), engine.engine_path.stat().st_size, settings)


def nncf_onnxruntime(work: Workload, folder: Path, max_drop: float) -> Contender:
    model = onnx.load(str(export(work, folder)))

    def opened(model: onnx.ModelProto) -> Logits:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return lambda image: np.asarray(session.run(None, {INPUT: work.normalized(image)})[0][0])

    # As in benchmarks.peers.nncf_onnxruntime.
    per_tensor = AdvancedQuantizationParameters(
        activations_quantization_params=QuantizationParameters(per_channel=False)
    )
    quantized = _controlled(
        model,
        nncf.Dataset(work.calibration, lambda image: {INPUT: work.normalized(image)}),
        work,
        opened,
        max_drop,
        preset=nncf.QuantizationPreset.MIXED,
        advanced_quantization_parameters=per_tensor,
    )
    path = folder / "nncf.onnx"
    onnx.save(quantized, str(path))
    return session_contender(work, path, {"preset": "mixed", "activations": "per tensor"})


def nncf_openvino(work: Workload, folder: Path, max_drop: float) -> Contender:
    model = ov.convert_model(export(work, folder))
    model.reshape([1, 3, work.spec.input.height, work.spec.input.width])

    def opened(compiled: ov.CompiledModel) -> Logits:
        return lambda image: np.asarray(next(iter(compiled(work.normalized(image)).values()))[0])

    quantized = _controlled(model, nncf.Dataset(work.calibration, work.normalized), work, opened, max_drop)
    path = folder / "nncf.xml"
    ov.save_model(with_processing(quantized, work), path, compress_to_fp16=False)
    request = ov.Core().compile_model(path, "CPU", {"PERFORMANCE_HINT": "LATENCY"}).create_infer_request()

    def call(image: NDArray[np.uint8]) -> NDArray[Any]:
        request.infer({0: image[None]}, share_inputs=True)
        return np.array(request.get_output_tensor(0).data[0])

    return Contender(call, path.with_suffix(".bin").stat().st_size, {"preset": "performance (the default)"})


def _controlled(
    model: Any,
    calibration: nncf.Dataset,
    work: Workload,
    opened: Callable[[Any], Logits],
    max_drop: float,
    **settings: Any,
) -> Any:
    def validate(inference: Any, pairs: Iterable[Pair]) -> tuple[float, list[float]]:
        given, logits = list(pairs), opened(inference)
        masks: list[NDArray[Any]] = [argmax(logits(image)) for image, _ in given]
        matrices = confusion(masks, replace(work, masks=tuple(truth for _, truth in given)))
        return float(miou(matrices.sum(axis=0))), [float(value) for value in miou(matrices)]

    return nncf.quantize_with_accuracy_control(
        model,
        calibration,
        nncf.Dataset(list(zip(work.images, work.masks, strict=True))),
        validate,
        max_drop=max_drop,
        drop_type=nncf.DropType.ABSOLUTE,
        subset_size=len(work.calibration),
        **settings,
    )


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("contender")
    for column in ("mIoU", "lost", "median ms", "build s", "CPU s"):
        shown.add_column(column, justify="right")
    for row in rows:
        latency = row.get("latency")
        shown.add_row(
            row["name"],
            f"{row['miou']:.4f}",
            f"{row['miou_drop']:.4f}",
            "-" if latency is None else f"{latency['median_ms']:.2f}",
            *(f"{row[key]:.0f}" if key in row else "-" for key in ("build_s", "build_cpu_s")),
        )
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    hard = [f"hard {name}" for name in hard_networks.NETWORKS]
    parser.add_argument("--names", nargs="+", choices=[*demo_models(), *hard], default=["fpn", "unet"])
    parser.add_argument("--folder", type=Path, help="with weights, as benchmarks.hard_networks leaves it")
    parser.add_argument("--max-drop", type=float, default=0.005)
    parser.add_argument("--shared-machine", action="store_true", help="record that other programs ran beside")
    parser.add_argument("--output", type=Path, default=RESULTS / "accuracy_control.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
