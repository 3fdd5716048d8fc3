"""Trained models of the Hugging Face hub by id, ``user/model`` or ``user/model@revision``, as for ``smp.from_pretrained``.

Only data is fetched: the weights as safetensors, ``config.json``, the saved preprocessing and the model card. What is in
the cache is used without asking the hub, so a build without a network is the same build.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeseg.convert.architectures import import_for_conversion
from edgeseg.convert.hub import cached_file, file_url, require_hub
from edgeseg.convert.model_card import CARD_NAME
from edgeseg.convert.saved_preprocessing import CONFIG_NAME
from edgeseg.errors import CheckpointError, one_line

_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[A-Za-z0-9][\w./-]*))?")
_FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar", ".onnx", ".pkl", ".zip", ".h5")
_REQUIRED = ("config.json", "model.safetensors")


@dataclass(frozen=True)
class HubModel:
    """A model of the hub in the local cache.

    Attributes:
        repository: ``user/model``.
        revision: the commit, 40 hex digits where the hub is Hugging Face's.
        folder: the commit's files, as ``save_pretrained`` wrote them.
        notes: for the user.
    """

    repository: str
    revision: str
    folder: Path
    notes: tuple[str, ...]


def is_hub_id(weights: str) -> bool:
    """Whether ``weights`` names a model of the hub: no path that is there, nor the name of a file."""
    match = _ID.fullmatch(weights)
    if match is None or ".." in weights or Path(weights).expanduser().exists():
        return False
    return not match["repository"].lower().endswith(_FILES)


def fetch_model(weights: str, *, needs_preprocessing: bool) -> HubModel:
    """Find a model in the cache, or fetch it.

    Args:
        weights: what :func:`is_hub_id` accepts.
        needs_preprocessing: whether it has to be known if a preprocessing was saved with the model, because the user
            says none.

    Raises:
        CheckpointError: it is neither cached nor to be had, within a few seconds where the hub does not answer; it has no
            safetensors.
    """
    match = _ID.fullmatch(weights)
    assert match is not None
    repository, asked = match["repository"], match["revision"] or "main"
    hub = import_for_conversion("huggingface_hub")
    try:
        config = cached_file(repository, "config.json", asked)
        revision = asked if config is None else Path(config).parent.name
        have = [cached_file(repository, name, revision) for name in _REQUIRED]
        unknown = [
            name
            for name in (CONFIG_NAME, CARD_NAME)
            # None: never asked for; that it does not exist is cached too.
            if hub.try_to_load_from_cache(repository, name, revision=revision) is None
        ]
    except ValueError as exc:
        raise CheckpointError(f"{weights} is no id of the hub: {one_line(exc)}") from exc
    if config is not None and all(have) and (CONFIG_NAME not in unknown or not needs_preprocessing):
        fresh = "" if asked == revision else "; newer ones are not asked for, @REVISION takes another"
        note = f"{repository} is used as it is in the Hugging Face cache, at revision {revision[:12]}{fresh}"
        return HubModel(repository, revision, Path(config).parent, (note,))
    if config is not None and all(have):
        what = f"the saved preprocessing ({CONFIG_NAME}) of {repository}, if it has one,"
        instead = "or give --mean and --std"
    else:
        what = f"{weights}, no file or folder here and so a model of the hub,"
        instead = "or give --weights PATH"
    advice = f"copy the cache of a machine with a network, after: hf download {repository}; {instead}"
    require_hub(what, file_url(repository, revision), is_plural=False, advice=advice)
    return _download(hub, repository, asked, weights)


def _download(hub: Any, repository: str, revision: str, weights: str) -> HubModel:
    errors = import_for_conversion("huggingface_hub.errors")

    def get(name: str, at: str) -> Path:
        return Path(hub.hf_hub_download(repository, name, revision=at, etag_timeout=5))

    try:
        folder = get("config.json", revision).parent
        commit = folder.name
        get("model.safetensors", commit)
        for name in (CONFIG_NAME, CARD_NAME):
            try:
                get(name, commit)
            except errors.EntryNotFoundError:
                continue
    except errors.EntryNotFoundError as exc:
        raise CheckpointError(
            f"{weights} on the hub has no {' or no '.join(_REQUIRED)}, so it was not saved with SMP's save_pretrained; "
            "download its weights and give --weights PATH with --arch"
        ) from exc
    except Exception as exc:  # the hub's client raises errors of several HTTP libraries
        raise CheckpointError(f"fetching {weights} failed: {one_line(exc)}; try again, or give --weights PATH") from exc
    note = f"{repository} was fetched from the Hugging Face hub, at revision {commit[:12]}"
    return HubModel(repository, commit, folder, (note,))
