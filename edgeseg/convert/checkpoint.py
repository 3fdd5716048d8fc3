"""Read tensors from checkpoint files that may be truncated, foreign or hostile.

Nothing here runs code from a file: pickles are read with ``torch.load(weights_only=True)``, zip archives are measured
before they are opened, and every tensor is checked to be backed by the bytes it claims.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import re
import types
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeseg.convert.architectures import import_for_conversion
from edgeseg.errors import CheckpointError, one_line
from edgeseg.silence import without_warnings
from edgeseg.store.files import require_regular

if TYPE_CHECKING:
    import torch

MAX_FILE_BYTES = 16 << 30
MAX_CONFIG_BYTES = 1 << 20

# Keys under which trainers nest the state dict, in the order they are looked for; averaged weights only where there are
# no plain ones, or when they are asked for.
_PLAIN_UNDER = (
    *("state_dict", "model_state_dict", "model", "net", "module", "model_state", "weights", "network", "state"),
    *("params", "generator", "student"),
)
_AVERAGED_UNDER = ("ema", "state_dict_ema", "ema_state_dict", "model_ema", "params_ema", "ema_model", "swa_state_dict")
# Where trainers keep the arguments of the model beside it; Lightning's key first.
_SETTINGS_UNDER = (
    *("hyper_parameters", "hparams", "hyperparameters", "model_config", "model_args", "model_kwargs", "model_params"),
    *("config", "cfg", "args", "kwargs", "init_args"),
)
_NESTED_UNDER = (*_PLAIN_UNDER, *_AVERAGED_UNDER)

_RESAVE = 'in Python, torch.save(model.state_dict(), "weights.pt") and give that file (or .safetensors)'


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a file, and what came with them.

    Attributes:
        path: the file they were read from.
        tensors: by the key in the file; dense, on the CPU, any dtype.
        config: ``config.json`` of a ``save_pretrained`` folder, or empty.
        settings: what training saved beside the state dict, such as Lightning's ``hyper_parameters``: by its key.
        notes: what was chosen while reading, for the user.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_checkpoint(source: str | Path, key: str | None = None) -> Checkpoint:
    """Read a ``save_pretrained`` folder, ``.safetensors``, or a state dict in a ``.pt``/``.pth``/``.ckpt``/``.bin``.

    The content decides the format, not the file's name.

    Args:
        source: the file or folder.
        key: under which the state dict stands in a pickled checkpoint, such as ``"state_dict_ema"``; default the usual
            ones, plain weights before averaged ones.

    Raises:
        CheckpointError: no state dict under ``key``; missing, empty, truncated, too large, foreign, or it would need to run code.
    """
    path = existing_checkpoint(source)
    if path.is_dir():
        return _read_folder(path, key)
    config = _config_beside(path)
    notes = (f"architecture and arguments read from config.json beside {path.name}",) if config else ()
    return _read_file(path, config, notes, key)


def existing_checkpoint(source: str | Path) -> Path:
    """The path of a file or folder that is there. Raises :class:`CheckpointError`."""
    path = Path(source).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"no such file or folder: {path}; give --weights PATH (save_pretrained folder, .safetensors, .pt, .pth or "
            ".ckpt), user/model of the Hugging Face hub, imagenet or random"
        )
    return path


def _read_folder(folder: Path, key: str | None) -> Checkpoint:
    config_path = folder / "config.json"
    names = ("model.safetensors", "pytorch_model.bin")
    weights = next((folder / n for n in names if (folder / n).is_file()), None)
    if not config_path.is_file() or weights is None:
        lacks = " and ".join([] if config_path.is_file() else ["config.json"]) or " or ".join(names)
        raise CheckpointError(
            f"{folder} is not a save_pretrained folder (no {lacks}); make one with model.save_pretrained(folder), or "
            "give the weights file itself"
        )
    return _read_file(weights, _read_config(config_path), (), key)


def _config_beside(path: Path) -> dict[str, Any]:
    config_path = path.parent / "config.json"
    if path.name not in ("model.safetensors", "pytorch_model.bin") or not config_path.is_file():
        return {}
    config = _read_config(config_path)
    return config if "_model_class" in config else {}


def read_saved_json(path: Path, what: str, advice: str) -> Any:
    """JSON that ``save_pretrained`` left beside weights.

    Raises:
        CheckpointError: unreadable, above 1 MiB, or no JSON: ``advice`` says what to do.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; {what} has a few hundred")
        return json.loads(path.read_bytes())
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} is damaged or not JSON; {advice}") from exc


def _read_config(path: Path) -> dict[str, Any]:
    config = read_saved_json(path, "a model's config.json", "save the model again with save_pretrained")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not the arguments of a model")
    return config


def _read_file(path: Path, config: dict[str, Any], notes: tuple[str, ...], key: str | None) -> Checkpoint:
    require_regular(path, "weights", CheckpointError)
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            head = f.read(64)
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror}") from exc
    if size == 0:
        raise CheckpointError(f"{path} is empty; copy or download it again")
    if size > MAX_FILE_BYTES:
        raise CheckpointError(f"{path} has {size >> 30} GiB, more than the {MAX_FILE_BYTES >> 30} GiB read here")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run: git lfs pull")
    settings: dict[str, dict[str, Any]] = {}
    if _looks_like_safetensors(head, size, path):
        tensors = _read_safetensors(path)
        if key is not None:
            raise CheckpointError(f"{path} is a safetensors file, which holds one state dict; leave --weights-key out")
    else:
        tensors, settings, chosen = _read_pickle(path, head, size, key)
        notes = (*notes, *chosen)
    _check_backing(path, tensors, size)
    return Checkpoint(path, tensors, config, settings, notes)


def _looks_like_safetensors(head: bytes, size: int, path: Path) -> bool:
    # Format: u64 little-endian length of a JSON header, then the header, which starts with "{".
    if path.suffix.lower() == ".safetensors":
        return True
    return len(head) >= 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    safetensors = import_for_conversion("safetensors")
    loader = import_for_conversion("safetensors.torch")
    try:
        tensors: dict[str, torch.Tensor] = loader.load_file(str(path), device="cpu")
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, RuntimeError) as exc:
        raise CheckpointError(
            f"{path} is truncated, damaged or no safetensors file ({one_line(exc)}); copy or download it again"
        ) from exc
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    return tensors


def _read_pickle(
    path: Path, head: bytes, size: int, key: str | None
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]], tuple[str, ...]]:
    torch = import_for_conversion("torch")
    if head.startswith(b"PK"):
        _check_archive(path, size)
    elif not head.startswith((b"\x80", b"]", b"(", b"}")):
        raise CheckpointError(
            f"{path} is no PyTorch checkpoint (starts with {head[:8]!r}): truncated, or another format; give a "
            "save_pretrained folder, .safetensors, or a state dict (.pt, .pth, .ckpt)"
        )
    try:
        with without_warnings(), torch.serialization.safe_globals(_harmless_types()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # a broken pickle can raise nearly anything; all of it means "cannot be read"
        raise _pickle_error(path, exc) from exc
    tensors, notes = _find_state_dict(path, content, key)
    return tensors, _settings(content), notes


def _settings(content: object) -> dict[str, dict[str, Any]]:
    beside = {name: content.get(name) for name in _SETTINGS_UNDER} if isinstance(content, Mapping) else {}
    plain = {name: vars(v) if isinstance(v, argparse.Namespace) else v for name, v in beside.items()}
    return {name: dict(v) for name, v in plain.items() if isinstance(v, Mapping)}


def _check_archive(path: Path, size: int) -> None:
    """Refuse archives torch.save does not write: compressed members (bombs), TorchScript, cut-off files."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as exc:
        raise CheckpointError(f"{path} is truncated or damaged ({one_line(exc)}); copy or download it again") from exc
    names = [m.filename for m in members]
    if any(n.endswith("/constants.pkl") for n in names):
        raise CheckpointError(f"{path} is a TorchScript archive; from the model it was made of, {_RESAVE}")
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        raise CheckpointError(f"{path} is a compressed archive, which torch.save never writes; {_RESAVE}")
    if not any(n.endswith("/data.pkl") or n == "data.pkl" for n in names):
        raise CheckpointError(f"{path} is a zip archive, but no PyTorch checkpoint; {_RESAVE}")


def _harmless_types() -> list[Any]:
    """Return the types trainers leave in a checkpoint that hold data only, and whose making runs no code of the file.

    A pair gives the name a type has in the file, where that differs from today's or from this machine's.
    """
    import numpy as np

    numeric = {type(np.dtype(t)) for t in "?bBhHiIlLqQefdUSMm"}
    multiarray = getattr(np, "_core", None) or np.core
    arrays = [
        (function, f"numpy.{package}.multiarray.{function.__name__}")
        for function in (multiarray.multiarray.scalar, multiarray.multiarray._reconstruct)
        for package in ("core", "_core")
    ]
    paths = [
        (kind, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for kind, name in (
            (pathlib.PurePosixPath, "PosixPath"),
            (pathlib.PurePosixPath, "PurePosixPath"),
            (pathlib.PureWindowsPath, "WindowsPath"),
            (pathlib.PureWindowsPath, "PureWindowsPath"),
        )
    ]
    return [
        argparse.Namespace,
        types.SimpleNamespace,
        # torch fills plain dictionaries and lists only.
        (lambda *_: {}, "collections.defaultdict"),
        (lambda *_: [], "collections.deque"),
        *(list, dict, tuple, set, frozenset, int, float, str, bool, range, slice),
        *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
        np.ndarray,
        np.dtype,
        *numeric,
        *arrays,
        *paths,
    ]


def _pickle_error(path: Path, exc: Exception) -> CheckpointError:
    """Say what torch.load objected to, without its own advice, which is to load with full powers."""
    text = str(exc)
    needed = re.search(r"GLOBAL ([\w.]+)", text)
    if needed is not None:
        name = needed.group(1)
        if re.match(r"(segmentation_models_pytorch|torch\.nn\.modules)\.(.*\.)?(loss(es)?)\.", name):
            what = f"holds a loss object ({name}) beside its weights"
        elif name.startswith(("segmentation_models_pytorch.", "torch.nn.modules.", "timm.", "torchvision.models.")):
            what = f"holds a pickled module ({name})"
        else:
            what = f"is a pickle that would run code to open ({name})"
        return CheckpointError(f"{path} {what}, which is refused; where you trust it, {_RESAVE}")
    built = re.search(r"add_safe_globals.*but got <class '([\w.]+)'>", text)
    if built is not None:
        name = "an array of Python objects" if built[1].endswith("ObjectDType") else built[1]
        return CheckpointError(
            f"{path} holds {name} beside its weights, which is refused; where you trust it, {_RESAVE}"
        )
    if "Unsupported operand" in text or "Unsupported class" in text:
        return CheckpointError(
            f"{path} is a pickle that torch.save did not write, which is refused; where you trust it, {_RESAVE}"
        )
    detail = text.split("WeightsUnpickler error:")[-1].split("Check the documentation")[0]
    return CheckpointError(
        f"{path} is truncated or damaged ({one_line(detail) or type(exc).__name__}); copy or download it again"
    )


def _find_state_dict(path: Path, content: object, key: str | None) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Return the mapping of names to tensors inside what torch.load returned, at most three levels deep, and notes."""
    candidates = _candidates(content)
    if key is not None:
        if key not in candidates:
            have = ", ".join(n for n in candidates if n) or "none under a key"
            raise CheckpointError(
                f"{path} holds no state dict under {key[:60]!r} (it has: {have}); change --weights-key"
            )
        return candidates[key], (f"the state dict under {key!r} is used, as asked",)
    whole = {name: tensors for name, tensors in candidates.items() if _has_head(tensors)} or candidates
    if whole:
        chosen, *others = whole
        beside = ", ".join(repr(name) for name in others)
        if not _is_usual(chosen) and others:
            raise CheckpointError(
                f"{path} holds {len(whole)} state dicts, under {chosen!r}, {beside}; say which with --weights-key"
            )
        if not others:
            kind = "averaged weights" if _is_averaged(chosen) else "weights"
            told = _is_averaged(chosen) or not _is_usual(chosen)
            note = f"{kind} are used, those under {chosen!r}: there are no others"
            return whole[chosen], (note,) if told else ()
        kind = "averaged ones" if all(map(_is_averaged, others)) else "others"
        where = f"under {chosen!r}" if chosen else "under no key"
        return whole[chosen], (f"the weights {where} are used; {kind} are under {beside}: --weights-key takes those",)
    if isinstance(content, Mapping):
        keys = ", ".join(repr(k) for k in list(content)[:6]) or "nothing"
        raise CheckpointError(f"{path} holds no state dict (it has {keys[:120]}); {_RESAVE}")
    raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict; {_RESAVE}")


def _tensors(mapping: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    torch = import_for_conversion("torch")
    return {k: v.detach() for k, v in mapping.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}


def _has_head(tensors: Mapping[str, object]) -> bool:
    return any("segmentation_head." in name for name in tensors)


def _is_usual(name: str) -> bool:
    return all(part in _NESTED_UNDER for part in name.split(".")) if name else True


def _is_averaged(name: str) -> bool:
    return any(part in _AVERAGED_UNDER for part in name.split("."))


def _candidates(content: object) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each place where a state dict may be, by its keys joined by dots, in the order of preference.

    Under a key that trainers do not usually take, only what has a segmentation head counts.
    """
    if not isinstance(content, Mapping):
        return {}
    places = {"": content, **dict(_nested(content, "", 3, set()))}
    # A pickle can hold one mapping under any number of names: it is looked through once.
    held = {id(mapping): _tensors(mapping) for mapping in {id(m): m for m in places.values()}.values()}
    whole = {number for number, tensors in held.items() if _has_head(tensors)}
    every = {
        name: held[id(mapping)]
        for name, mapping in places.items()
        if held[id(mapping)] and (_is_usual(name) or id(mapping) in whole)
    }

    def rank(name: str) -> tuple[bool, bool, int, list[int]]:
        parts = name.split(".") if name else []
        places = [_NESTED_UNDER.index(part) for part in parts] if _is_usual(name) else []
        return not _is_usual(name), _is_averaged(name), len(parts) or 9, places

    return {name: every[name] for name in sorted(every, key=rank)}


def _nested(
    mapping: Mapping[Any, Any], prefix: str, levels: int, opened: set[int]
) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Mappings inside of ``mapping`` by their keys; one that is there several times is opened once."""
    if not levels or id(mapping) in opened:
        return
    opened.add(id(mapping))
    inside = [(k, v) for k, v in mapping.items() if isinstance(k, str) and isinstance(v, Mapping)]
    yield from ((prefix + key, inner) for key, inner in inside)
    for key, inner in inside:
        yield from _nested(inner, f"{prefix}{key}.", levels - 1, opened)


def _check_backing(path: Path, tensors: Mapping[str, torch.Tensor], size: int) -> None:
    """Refuse tensors that are not plain CPU data, or claim more values than the file has bytes for.

    A pickle can describe a tensor of 10**12 elements over a storage of one (stride 0): reading it would fill memory.
    """
    torch = import_for_conversion("torch")
    total = 0
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_complex():
            raise CheckpointError(f"{path}: {name} is no plain tensor (quantized, sparse or without data); {_RESAVE}")
        total += tensor.numel() * tensor.element_size()
    # Tied weights appear twice over one storage, so a little more than the file is honest.
    if total > 4 * size + (1 << 20):
        raise CheckpointError(
            f"{path} claims {total} bytes of tensors in {size} bytes of file: damaged or hostile; do not use it"
        )
