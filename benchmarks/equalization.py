"""What equalization of channels recovers: INT8 of trained networks, and of the same networks badly scaled.

Each demo model as trained, and with channels scaled by 1/32..32 (:mod:`benchmarks.badly_scaled`: the float network computes the
same), built with and without equalization, for the kernels of three targets; judged on the demo's validation scenes. Of
the targets that run here, the engine of the badly scaled network and that of the network as trained, both equalized, are timed in
turns. Graphs for TensorRT are executed in ONNX Runtime as they are written; nothing is said about a GPU.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

import edgeseg
from benchmarks.badly_scaled import badly_scaled
from benchmarks.hard_networks import in_turns
from benchmarks.record import RESULTS, Record, ratios, this_machine, versions
from edgeseg.convert.load import load_model
from edgeseg.demo import demo_models, sample_folder
from edgeseg.spec import ModelRequest
from edgeseg.store.engine import Engine, open_engine

TARGETS = ("onnxruntime", "openvino", "tensorrt")


def main() -> None:
    options = arguments()
    machine = this_machine()
    rows: list[dict[str, Any]] = []
    speeds: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for arch in options.archs:
            loaded = load_model(ModelRequest(arch=arch))
            networks = {"as trained": (loaded.module, loaded.preprocess), "badly scaled": badly_scaled(arch)}
            for name, (module, preprocess) in networks.items():
                for target in TARGETS:
                    rows.append({"name": f"{arch}, {name}, {target}"})
                    for equalize in (False, True):
                        engine = edgeseg.build(
                            module,
                            precision="int8",
                            size=loaded.size,
                            mean=preprocess.mean,
                            std=preprocess.std,
                            calibration=sample_folder() / "calib" / "images",
                            validation=sample_folder() / "val",
                            target=target,
                            equalize=equalize,
                            output=Path(scratch) / f"{name}, {target}",
                            force=True,
                        )
                        rows[-1] |= figures(engine, "equalized" if equalize else "plain")
                    print(rows[-1], flush=True)
            for target in ("onnxruntime", "openvino"):
                engines = {name: open_engine(Path(scratch) / f"{name}, {target}") for name in networks}
                speeds[f"{arch}, {target}"] = ratios(in_turns(engines), ("as trained",))["as trained"]["badly scaled"]
                print(arch, target, speeds[f"{arch}, {target}"], flush=True)
    record = Record(
        benchmark="equalization",
        workload="INT8 with and without equalization of channels, demo models as trained and badly scaled; TensorRT's graphs "
        "executed in ONNX Runtime, not run on a GPU",
        machine=machine,
        versions=versions(),
        settings={"shared_machine": options.shared_machine},
        rows=rows,
        ratios={"as trained": speeds},
    )
    record.write(options.output)
    Console(width=130).print(table(rows))


def figures(engine: Engine, prefix: str) -> dict[str, Any]:
    verification = engine.manifest.verification
    assert verification is not None
    return {
        "miou_pytorch": verification.pytorch_accuracy.miou,
        f"miou_{prefix}": verification.engine_accuracy.miou,
        f"agreement_{prefix}": verification.agreement,
        f"int8_share_{prefix}": engine.manifest.precision.mac_share.get("int8", 0.0),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("network", box=box.SIMPLE_HEAD)
    columns = [key for key in rows[0] if key != "name"]
    for column in columns:
        shown.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        shown.add_row(row["name"], *(f"{row[key]:.4f}" for key in columns))
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=demo_models())
    parser.add_argument("--shared-machine", action="store_true", help="record that other programs ran beside")
    parser.add_argument("--output", type=Path, default=RESULTS / "equalization.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
