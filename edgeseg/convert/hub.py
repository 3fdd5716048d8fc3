"""Pretrained encoder weights, which SMP and timm fetch from the Hugging Face hub.

Without a network the hub's client retries for half a minute and more. So it is asked only for files that are
cached, or after the hub has answered a small request within a few seconds.
"""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from edgeseg.convert.architectures import import_for_conversion
from edgeseg.errors import CheckpointError, SpecError, one_line

PROBE_SECONDS = 3.0


def hub_weights_names(encoder: str) -> tuple[str, ...]:
    """Return the names of the pretrained weights an encoder has; for timm's, whose name tells, ``imagenet``."""
    smp = import_for_conversion("segmentation_models_pytorch")
    if encoder in smp.encoders.encoders:
        return tuple(smp.encoders.encoders[encoder]["pretrained_settings"])
    timm = import_for_conversion("timm")
    return ("imagenet",) if timm.models.is_model_pretrained(_timm_name(encoder)) else ()


def refuse_early(encoder: str) -> None:
    """Raise before anything slow is imported when an encoder's weights can be neither in the cache nor fetched.

    Raises:
        CheckpointError: no file of the encoder is cached, and the hub does not answer.
    """
    constants = import_for_conversion("huggingface_hub.constants")
    cache = Path(constants.HF_HUB_CACHE)
    base = encoder.lower().removeprefix("tu-").removeprefix("timm-").split(".")[0]
    if not cache.is_dir() or not any(base in folder.name.lower() for folder in cache.iterdir()):
        require_hub(f"pretrained weights of {encoder}", constants.ENDPOINT, any_answer=True)


def prepare_hub_weights(encoder: str, name: str) -> tuple[str, dict[str, Any]]:
    """Make sure that building with these weights will not hang.

    Returns:
        their repository on the hub, and constructor arguments the loading needs (a cached file for timm).

    Raises:
        SpecError: the encoder has no such weights; names those it has.
        CheckpointError: they are neither cached nor reachable; raised within about ``PROBE_SECONDS``.
    """
    names = hub_weights_names(encoder)
    if name not in names:
        have = ", ".join(names) or "none"
        raise SpecError(f"{encoder} has no pretrained weights {name!r} (it has: {have}); give --weights PATH or random")
    smp = import_for_conversion("segmentation_models_pytorch")
    if encoder in smp.encoders.encoders:
        settings = smp.encoders.encoders[encoder]["pretrained_settings"][name]
        repository, revision = settings["repo_id"], settings["revision"]
        cached = all(cached_file(repository, f, revision) for f in ("config.json", "model.safetensors"))
        if not cached:
            require_hub(f"pretrained weights of {encoder} ({repository})", file_url(repository, revision))
        return repository, {}
    timm = import_for_conversion("timm")
    config = timm.get_pretrained_cfg(_timm_name(encoder))
    repository = config.hf_hub_id or ""
    path = cached_file(repository, config.hf_hub_filename or "model.safetensors", None) if repository else None
    if path:
        # Named by file: by repository, timm would ask the hub whether the cached one is still the newest.
        return repository, {"pretrained_cfg_overlay": {"file": path}}
    require_hub(f"pretrained weights of {encoder} ({repository})", file_url(repository, "main"))
    return repository, {}


def _timm_name(encoder: str) -> str:
    if encoder.startswith("tu-"):
        return encoder.removeprefix("tu-")
    base = encoder.removeprefix("timm-")
    return f"tf_{base}" if "mobilenetv3" in base else base


def cached_file(repository: str, filename: str, revision: str | None) -> str | None:
    """Path of a file of the hub's cache, without asking the hub; ``None`` where it is not there."""
    hub = import_for_conversion("huggingface_hub")
    path = hub.try_to_load_from_cache(repository, filename, revision=revision)
    return path if isinstance(path, str) else None


def file_url(repository: str, revision: str) -> str:
    """What to ask for to learn whether the hub answers and has the repository."""
    endpoint = import_for_conversion("huggingface_hub.constants").ENDPOINT
    return f"{endpoint}/{repository}/resolve/{revision}/config.json"


WHOLE_CHECKPOINT = (
    "give --weights PATH of a whole trained checkpoint, or copy the Hugging Face cache of a machine that has them"
)


def require_hub(
    what: str, url: str, *, any_answer: bool = False, is_plural: bool = True, advice: str = WHOLE_CHECKPOINT
) -> None:
    """Raise unless the URL answers; with ``any_answer``, an HTTP error is an answer too."""
    lacks = f"{what} {'are' if is_plural else 'is'} not cached"
    constants = import_for_conversion("huggingface_hub.constants")
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"{lacks} and HF_HUB_OFFLINE is set; unset it, or {advice}")
    problem = _probe(url)
    if problem is not None and not (any_answer and problem.startswith("HTTP ")):
        raise CheckpointError(f"{lacks} and {constants.ENDPOINT} does not answer ({problem}); {advice}")


def _probe(url: str) -> str | None:
    """Return ``None`` when the URL answers in time, else the reason in a few words."""
    answers: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "edgeseg"})
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
                answers.append(None)
        except urllib.error.HTTPError as exc:
            answers.append(f"HTTP {exc.code}")
        except (OSError, ValueError) as exc:
            answers.append(one_line(getattr(exc, "reason", exc)))

    # Name resolution knows no timeout, so the whole question gets one: the thread is left behind when it hangs.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 0.5)
    return answers[0] if answers else f"no answer within {PROBE_SECONDS:.0f} s"
