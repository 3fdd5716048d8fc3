"""Every family of encoders, its smallest member, with an architecture each in rotation: does it build, how long, how near?

``python -m benchmarks.encoders`` (``make encoders``) builds what ``results/encoders.json`` does not hold yet, one process
at a time with a time limit, and writes the file after each; ``--only NAME`` builds one again. ``--page`` only writes
``docs/encoders.md`` from the file. Weights are random: what is shown is that the engine is the PyTorch model, and how far INT8
of an untrained network is from it, never accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.record import RESULTS, Record, read_record, this_commit, this_machine, versions
from benchmarks.results import machine, markdown_row
from edgeseg.spec import ARCHITECTURES
from edgeseg.store.documents import write_text

FILE = RESULTS / "encoders.json"
DEMO = RESULTS.parents[1] / "calibration" / "demo"
PAGE = RESULTS.parents[1] / "docs" / "encoders.md"
SIDE = 128
CLASSES = 4
VARIANTS = ("fp32", "dynamic", "int8")

SMP_FAMILIES = (
    "resnet18", "resnext50_32x4d", "dpn68", "vgg11", "vgg11_bn", "senet154", "se_resnet50", "se_resnext50_32x4d",
    "densenet121", "inceptionresnetv2", "inceptionv4", "efficientnet-b0", "mobilenet_v2", "xception",
    "timm-efficientnet-b0", "timm-tf_efficientnet_lite0", "timm-skresnet18", "timm-skresnext50_32x4d", "mit_b0",
    "mobileone_s0",
)  # fmt: skip
"""The smallest of each family in ``smp.encoders.encoders``."""

RENAMED_FAMILIES = (
    "timm-mobilenetv3_small_minimal_100", "timm-mobilenetv3_large_100", "timm-res2net50_26w_4s", "timm-resnest14d",
    "timm-regnetx_002", "timm-regnety_002", "timm-gernet_s",
)  # fmt: skip
"""Names of SMP 0.4 and older, which SMP forwards to timm."""

TIMM_FAMILIES = (
    "mobilenetv3_small_050", "lcnet_035", "hardcorenas_a", "efficientvit_b0", "mobilevit_xxs", "mobilevitv2_050",
    "tiny_vit_5m_224", "tf_efficientnet_b0", "tf_efficientnet_lite0", "tf_efficientnetv2_b0",
    "tf_mobilenetv3_small_minimal_100", "efficientnetv2_rw_t", "mobilenetv4_conv_small_035", "mobilenetv2_035",
    "mobilenetv1_100", "mobileone_s0", "mnasnet_small", "tinynet_e", "ghostnet_050", "regnetx_002", "regnety_002",
    "resnet10t", "convnext_zepto_rms", "repvgg_a0", "hgnetv2_b0", "pvt_v2_b0", "edgenext_xx_small",
    "efficientformerv2_s0", "fastvit_t8", "repvit_m0_9", "dla46x_c", "rexnet_100", "repghostnet_050",
    "ghostnetv2_100", "seresnet18", "skresnet18", "gernet_s", "mixnet_s", "spnasnet_100", "semnasnet_050",
    "fbnetc_100", "efficientnet_b0", "efficientnet_lite0", "efficientnet_es", "mobilenet_edgetpu_100",
    "res2net50_48w_2s", "resnest14d", "legacy_seresnet18", "selecsls42", "ese_vovnet19b_slim_dw", "regnetz_005",
    "hrnet_w18_small", "darknet17", "sedarknet21", "resnetblur18", "resnetv2_18", "convnextv2_atto",
    "efficientformer_l1", "efficientvit_l1", "mambaout_femto", "poolformer_s12", "poolformerv2_s12", "dpn48b",
    "ecaresnet26t", "eca_resnet33ts", "eca_resnext26ts", "eca_vovnet39b", "eca_botnext26ts_256", "eca_halonext26ts",
    "eca_nfnet_l0", "ecaresnext26t_32x4d", "botnet26t_256", "bat_resnext26ts", "halonet26t", "halo2botnet50ts_256",
    "haloregnetz_b", "sehalonet33ts", "sebotnet33ts_256", "lambda_resnet26t", "lamhalobotnet50ts_256", "gcresnet33ts",
    "gcresnext26ts", "gc_efficientnetv2_rw_t", "cs3darknet_focus_s", "cs3edgenet_x", "cs3se_edgenet_x",
    "cs3sedarknet_l", "cspdarknet53", "cspresnet50", "cspresnext50", "darknetaa53", "densenet121", "densenetblur121d",
    "dla60_res2net", "dla60_res2next", "dm_nfnet_f0", "nfnet_l0", "nf_regnet_b0", "nf_resnet26", "nf_ecaresnet26",
    "nf_seresnet26", "efficientnet_b0_gn", "efficientnet_b0_g16_evos", "efficientnet_blur_b0",
    "efficientnet_cc_b0_4e", "fbnetv3_b", "mobilenetv4_hybrid_medium_075", "regnetv_040", "res2next50", "resnetaa34d",
    "resnetrs50", "resnetv2_50x1_bit", "resnext26ts", "resnet50_clip", "rexnetr_100", "seresnetaa50d",
    "seresnext26t_32x4d", "seresnextaa101d_32x8d", "legacy_seresnext26_32x4d", "legacy_senet154", "skresnext50_32x4d",
    "tf_efficientnet_es", "tf_efficientnet_cc_b0_4e", "tf_mixnet_s", "vgg11", "vovnet39a", "wide_resnet50_2",
    "xception41", "coatnet_pico_rw_224", "coatnext_nano_rw_224", "maxvit_pico_rw_256", "maxxvit_rmlp_nano_rw_256",
    "maxxvitv2_nano_rw_256", "caformer_s18", "convformer_s18", "davit_tiny", "fastvit_mci0", "focalnet_tiny_srf",
    "hgnet_tiny", "hiera_tiny_224", "hieradet_small", "sam2_hiera_tiny", "inception_next_tiny", "mvitv2_tiny",
    "nest_tiny", "nextvit_small", "rdnet_tiny", "swin_tiny_patch4_window7_224", "swin_s3_tiny_224",
    "swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224", "tresnet_m", "twins_pcpvt_small", "twins_svt_small",
    "senet154",
)  # fmt: skip
"""The smallest of each family that SMP's documentation lists as encoders of timm, without ``tu-``; the small ones first."""

ENCODERS = (*SMP_FAMILIES, *RENAMED_FAMILIES, *(f"tu-{name}" for name in TIMM_FAMILIES), "tu-vit_tiny_patch16_224")
_ROTATION = tuple(arch for arch in ARCHITECTURES if arch != "dpt")


def architectures_for(encoder: str) -> tuple[str, ...]:
    """The architecture of an encoder's turn, and those to try when the two cannot be put together."""
    if encoder.startswith("tu-vit"):
        return ("dpt",)
    turn = ENCODERS.index(encoder) % len(_ROTATION)
    return (*_ROTATION[turn:], *_ROTATION[:turn])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ENCODERS, metavar="ENCODER", help="build these, done or not")
    parser.add_argument("--again", choices=VARIANTS, help="build only this again, for the encoders that were built")
    parser.add_argument("--limit-s", type=float, default=900.0, help="for one encoder, then its process is ended")
    parser.add_argument("--jobs", type=int, default=1, help="encoders at a time, at most a core each")
    parser.add_argument("--until", help="local time HH:MM after which no other encoder is begun")
    parser.add_argument("--shared-machine", action="store_true", help="record that other programs ran beside")
    parser.add_argument("--page", action="store_true", help=f"build nothing, write {PAGE.name} from {FILE.name}")
    parser.add_argument("--one", nargs=2, metavar=("ENCODER", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        build_one(options.one[0], Path(options.one[1]))
    elif not options.page:
        run(options)
    if not options.one:
        write_text(PAGE, page(read_record(FILE)))


def run(options: argparse.Namespace) -> None:
    rows = {row["name"]: row for row in read_record(FILE).rows} if FILE.is_file() else {}
    lock = threading.Lock()

    def build(encoder: str) -> None:
        if options.until and time.strftime("%H:%M") >= options.until:
            return
        before = rows.get(encoder, {})
        kept = {key: value for key, value in before.items() if key != options.again} if options.again else {}
        row = in_process(encoder, kept, options.limit_s)
        with lock:
            rows[encoder] = row
            print(*row_cells(row), sep=" | ", flush=True)
            record = Record(
                benchmark="encoders",
                workload=f"{SIDE}x{SIDE} (or the encoder's only size), {CLASSES} classes, random weights, ONNX Runtime",
                machine=this_machine(),
                versions=versions(),
                settings={
                    "limit_s": options.limit_s,
                    "jobs": options.jobs,
                    "shared_machine": options.shared_machine,
                    "images": len(SIZES),
                },
                rows=[rows[name] for name in ENCODERS if name in rows],
            )
            record.write(FILE)

    names = options.only or [name for name in ENCODERS if (name in rows) == bool(options.again)]
    # Each on cores of its own: threads of two that wait for one core spin.
    cores = sorted(os.sched_getaffinity(0))
    shares = [set(cores[index :: options.jobs]) for index in range(options.jobs)]
    with ThreadPoolExecutor(options.jobs, initializer=lambda: os.sched_setaffinity(0, shares.pop())) as pool:
        for done in [pool.submit(build, name) for name in names]:
            done.result()


def in_process(encoder: str, kept: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """One encoder's row, built in a process of its own but for what is ``kept``; what was not finished in time is said."""
    with tempfile.TemporaryDirectory(prefix="edgeseg-encoders-") as folder:
        file = Path(folder) / "row.json"
        if kept:
            file.write_text(json.dumps(kept), encoding="utf-8")
        environment = {**os.environ, "EDGESEG_CACHE": f"{folder}/cache"}
        command = [sys.executable, "-m", "benchmarks.encoders", "--one", encoder, str(file)]
        process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)
        ended = ""
        try:
            _, errors = process.communicate(timeout=limit_s)
            if process.returncode:
                last = (errors.strip().splitlines() or [""])[-1]
                ended = f"the process ended with {process.returncode}: {last}"[:300]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            ended = f"not finished in {limit_s:.0f} s for all of this encoder's builds"
        row: dict[str, Any] = msgspec.json.decode(file.read_bytes()) if file.is_file() else {"name": encoder}
    if ended:
        first = next((variant for variant in VARIANTS if variant not in row), None)
        if first is not None:
            row[first] = {"failed": ended}
    return row


SIZES = ((SIDE, SIDE), (SIDE, SIDE), (SIDE + 32, SIDE + 64), (SIDE + 64, SIDE))
"""Of the images the engines are verified on, those without a dynamic size resized."""


def build_one(encoder: str, file: Path) -> None:
    """Build an encoder's engines, writing its row to ``file`` after each."""
    import edgeseg
    from edgeseg.errors import EdgesegError
    from edgeseg.images.decoding import list_images

    row: dict[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {"name": encoder}
    with tempfile.TemporaryDirectory() as scratch:
        validation = Path(scratch) / "validation"
        write_images(validation, list_images(DEMO / "val" / "images"))
        arguments: dict[str, Any] = {
            "encoder": encoder,
            "weights": "random",
            "classes": CLASSES,
            "size": None if has_one_size(encoder) else (SIDE, SIDE),
            "validation": validation,
            "target": "onnxruntime",
            "output": f"{scratch}/engine",
            "force": True,
        }
        variants: dict[str, dict[str, Any]] = {
            "fp32": {"precision": "fp32"},
            "dynamic": {"precision": "fp32", "dynamic_size": True, "batch": (1, 1, 3)},
            "int8": {"precision": "int8", "calibration": DEMO / "calib" / "images", "calibration_limit": 8},
        }
        candidates = iter(architectures_for(encoder))
        row.setdefault("arch", next(candidates))
        for variant, more in variants.items():
            while variant not in row:
                start = time.monotonic()
                try:
                    engine = edgeseg.build(row["arch"], **arguments, **more)
                except EdgesegError as exc:
                    result: dict[str, Any] = {"refused": str(exc)}
                except Exception as exc:
                    result = {"failed": f"internal error, {type(exc).__name__}: {exc}"[:300]}
                else:
                    verified = engine.manifest.verification
                    result = {
                        "agreement": None if verified is None else verified.agreement,
                        "int8_share": engine.manifest.precision.mac_share.get("int8", 0.0),
                    }
                result["seconds"] = round(time.monotonic() - start, 1)
                result["commit"] = this_commit()
                another = next(candidates, None) if variant == "fp32" and "refused" in result else None
                if another is None:
                    row[variant] = result
                else:  # the pair is refused, the encoder may still do
                    row.setdefault("not_with", {})[row["arch"]] = result["refused"]
                    row["arch"] = another
            file.write_text(json.dumps(row), encoding="utf-8")


def has_one_size(encoder: str) -> bool:
    import timm

    settings = timm.get_pretrained_cfg(encoder.removeprefix("tu-")) if encoder.startswith("tu-") else None
    return settings is not None and bool(settings.fixed_input_size)


def write_images(folder: Path, sources: Iterable[Path]) -> None:
    from PIL import Image

    folder.mkdir()
    for (height, width), source in zip(SIZES, sources, strict=False):
        with Image.open(source) as image:
            image.convert("RGB").resize((width, height)).save(folder / f"{source.stem}.png")


HEAD = """# Encoders

Generated by `python -m benchmarks.encoders` (`make encoders`) from `benchmarks/results/encoders.json`: of each family of
encoders the smallest member, with one architecture, all families and architectures in rotation. Weights are random:
agreement is the share of mask pixels equal to PyTorch's, which shows that an fp32 engine is the model (1.0000) and how far
INT8 of an untrained network is from it (1.0000 there mostly means a mask of one class); accuracy is neither. "dynamic" is fp32
with any size and one to three images. Seconds are those of the whole build, verification included.

Where INT8 is below 0.9 the same graph was given to ONNX Runtime's own quantizer, with the same images
(`python -m benchmarks.untrained_int8`): nowhere is it better by more than 0.006, and 0.048 worse at most.
Most of these networks amplify: pixels changed by one level of 255 move 1 to 6 % of the float graph's mask.
"""


def page(record: Record) -> str:
    """The page of a record; encoders it does not hold are listed as not run."""
    rows = {row["name"]: row for row in record.rows}
    busy = (
        " Other programs ran on the machine meanwhile: seconds are of a busy machine."
        if record.settings["shared_machine"]
        else ""
    )
    about = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    lines = [
        HEAD,
        f"{record.workload}. {machine(record.machine)}. {record.created[:10]}, {about}.{busy}\n",
        f"{commits(record.rows)}\n",
        markdown_row(("encoder", "architecture", "fp32", "s", "dynamic", "s", "INT8", "s", "MACs in int8")),
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(markdown_row(row_cells(rows[name])) for name in ENCODERS if name in rows),
        "",
    ]
    reasons = [reason for name in ENCODERS if name in rows for reason in reasons_of(rows[name])]
    if reasons:
        lines += ["## Refused, and why\n", *(f"- {reason}" for reason in reasons), ""]
    missing = [f"`{name}`" for name in ENCODERS if name not in rows]
    if missing:
        lines += [f"## Not run yet ({len(missing)})\n", ", ".join(missing) + ".", ""]
    return "\n".join(lines)


def commits(rows: Iterable[dict[str, Any]]) -> str:
    """Which edgeseg built how many of the engines, by variant."""
    by_variant = {
        variant: Counter(str(row[variant].get("commit") or "-") for row in rows if variant in row)
        for variant in VARIANTS
    }
    told = (
        f"{variant} {', '.join(f'{commit} ({n})' for commit, n in counts.most_common())}"
        for variant, counts in by_variant.items()
        if counts
    )
    return f"Built at the commits: {'; '.join(told)}."


def row_cells(row: dict[str, Any]) -> Iterator[str]:
    yield f"`{row['name']}`"
    yield row.get("arch", "-")
    for variant in VARIANTS:
        result = row.get(variant, {})
        agreement = result.get("agreement")
        figure = "-" if agreement is None else f"{agreement:.4f}"
        yield next((word for word in ("refused", "failed") if word in result), figure)
        yield "-" if "seconds" not in result else f"{result['seconds']:.0f}"
    share = row.get("int8", {}).get("int8_share")
    yield "-" if share is None else f"{share:.1%}"


def reasons_of(row: dict[str, Any]) -> Iterator[str]:
    for arch, reason in row.get("not_with", {}).items():
        yield f"`{row['name']}` with {arch}: {reason}"
    for variant in VARIANTS:
        for word in ("refused", "failed"):
            if word in row.get(variant, {}):
                yield f"`{row['name']}` with {row.get('arch', '-')}, {variant} {word}: {row[variant][word]}"


if __name__ == "__main__":
    main()
