"""The ``edgeseg build`` command that makes an engine again, for manifests and reports."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgeseg.pipeline.request import BuildRequest
from edgeseg.spec import BatchRange


def build_command(request: BuildRequest) -> str | None:
    """What to type for this request; ``None`` where no command line can say it (images or a table given as objects).

    Only what differs from the defaults is named, so the command stays readable and means the same in later versions.
    """
    model, output = request.model, request.output
    if request.calibration is not None and not isinstance(request.calibration, (str, Path)):
        return None
    if any("," in name or name != name.strip() for name in model.class_names):
        return None
    options: dict[str, Any] = {
        "arch": model.arch,
        "encoder": model.encoder,
        "weights": model.weights,
        "weights-key": model.weights_key,
        "classes": model.classes,
        "class-names": ",".join(model.class_names) or None,
        "task": model.task,
        "in-channels": model.in_channels,
        "activation": model.activation,
        "model-arg": _pairs(model.model_args),
        "keep-aux": model.keep_aux,
        "mean": _numbers(model.mean),
        "std": _numbers(model.std),
        "channel-order": model.channel_order,
        "precision": request.precision,
        "size": None if request.size is None else f"{request.size[0]}x{request.size[1]}",
        "batch": _batch(request.batch),
        "dynamic-size": request.dynamic_size,
        "fit": _unless_default(request, "fit"),
        "output-kind": _unless_default(output, "kind"),
        "confidence": output.confidence,
        "threshold": _unless_default(output, "threshold"),
        "calibration": request.calibration,
        "calibration-method": request.calibration_method,
        "calibration-limit": request.calibration_limit,
        "validation": request.validation,
        "ignore-index": request.ignore_index,
        "target": _unless_default(request, "target"),
        "scheme": request.scheme,
        "backend-option": _pairs(request.backend_options),
        "max-drop": request.max_drop,
        "min-agreement": request.min_agreement,
        "min-int8-share": _unless_default(request, "min_int8_share"),
        "output": request.folder,
    }
    words = ["edgeseg", "build"]
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            for one in value if isinstance(value, list) else [value]:
                # A value that begins with a dash would be read as an option.
                words += [f"--{name}={one}"] if str(one).startswith("-") else [f"--{name}", str(one)]
    return shlex.join(words)


def _unless_default(record: Any, name: str) -> Any:
    value = getattr(record, name)
    default = next(f.default for f in dataclasses.fields(record) if f.name == name)
    return None if value == default else value


def _batch(batch: BatchRange) -> str | None:
    if batch == BatchRange():
        return None
    return f"{batch.minimum}:{batch.optimum}:{batch.maximum}" if batch.is_dynamic else str(batch.minimum)


def _numbers(values: Iterable[float] | None) -> str | None:
    return None if values is None else ",".join(repr(float(value)) for value in values)


def _pairs(settings: Any) -> list[str]:
    """``KEY=VALUE`` words; a value is written as JSON unless it is a word that reads as itself."""
    found = []
    for key, value in settings.items():
        plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w./x+-]*", value) is not None
        is_word = plain and value not in {"true", "false", "null", "True", "False", "None"}
        found.append(f"{key}={value}" if is_word else f"{key}={json.dumps(value)}")
    return found
