"""Pretrained encoder weights, which SMP and timm fetch from the Hugging Face hub.

Without a network the hub's client retries for half a minute and more. So it is asked only for files that are
cached, or after the hub has answered a small request within a few seconds.
"""

from __future__ import annotations

import threading
import urllib.error
import urllib.parse
import urllib.request
from email.message import Message
from http import HTTPStatus
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
        # Which repository has them only SMP and timm know, which are slow to import.
        require_hub(f"pretrained weights of {encoder}", file_url(f"timm/{base}", "main"), any_hub=True)


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
    what: str, url: str, *, any_hub: bool = False, is_plural: bool = True, advice: str = WHOLE_CHECKPOINT
) -> None:
    """Raise unless a hub answers that it has the file; with ``any_hub``, that it has not is an answer too."""
    lacks = f"{what} {'are' if is_plural else 'is'} not cached"
    constants = import_for_conversion("huggingface_hub.constants")
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"{lacks} and HF_HUB_OFFLINE is set; unset it, or {advice}")
    problem = _probe(url, any_hub=any_hub)
    if problem is not None:
        raise CheckpointError(f"{lacks} and {problem}; {advice}")


class _FollowNothing(urllib.request.HTTPRedirectHandler):
    """Where a network sends everything to its login page, that is the answer; and the token is for the hub alone."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _probe(url: str, *, any_hub: bool = False) -> str | None:
    """Return ``None`` when a hub answers in time that it has the file, else what happened and what to do about it."""
    site = urllib.parse.urlsplit(url)
    name = f"{site.scheme}://{site.netloc}"
    answers: list[str | None] = []
    get_token = import_for_conversion("huggingface_hub").get_token

    def ask() -> None:
        headers = {"User-Agent": "edgeseg"}
        try:
            if token := get_token():
                headers["Authorization"] = f"Bearer {token}"
            request = urllib.request.Request(url, method="HEAD", headers=headers)
            with urllib.request.build_opener(_FollowNothing).open(request, timeout=PROBE_SECONDS) as answer:
                answers.append(_wrong_with(name, answer.status, answer.headers, any_hub))
        except urllib.error.HTTPError as exc:
            answers.append(_wrong_with(name, exc.code, exc.headers, any_hub))
        except Exception as exc:  # of a token that cannot be renewed, the hub's client raises whatever it likes
            reason = one_line(getattr(exc, "reason", exc))
            # Of an encrypted connection the proxy's answer is an error of the connection.
            answers.append(_PROXY_LOGIN.format(name) if " 407 " in reason else f"{name} does not answer ({reason})")

    # Name resolution knows no timeout, so the whole question gets one: the thread is left behind when it hangs.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 0.5)
    return answers[0] if answers else f"{name} does not answer (nothing within {PROBE_SECONDS:.0f} s)"


_PROXY_LOGIN = "the proxy in front of {} wants a login (HTTP 407): set HTTPS_PROXY and HTTP_PROXY to http://USER:PASSWORD@HOST:PORT"


def _wrong_with(name: str, status: int, headers: Message, any_hub: bool) -> str | None:
    """Why an answer is not that of a hub that has the file; ``name`` is of who was asked."""
    said = f"HTTP {status} {HTTPStatus(status).phrase}" if status in set(HTTPStatus) else f"HTTP {status}"
    is_page = headers.get("Content-Type", "").startswith("text/html")
    place = urllib.parse.urlsplit(headers.get("Location", ""))
    if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        return _PROXY_LOGIN.format(name)
    if "X-Repo-Commit" in headers and status < 400:
        return None
    # Of a model that is private, gated or not there, the hub tells the same.
    if "X-Error-Code" in headers or (status == HTTPStatus.UNAUTHORIZED and not is_page):
        wanted = "check its name; private and gated ones need a login (hf auth login, or HF_TOKEN)"
        return None if any_hub else f"{name} has it not, or not for you ({said}): {wanted}"
    if status < 400 and (is_page or (place.netloc and f"{place.scheme}://{place.netloc}" != name)):
        where = f"sends everything to {place.scheme}://{place.netloc}" if place.netloc else "answers with a web page"
        return f"{name} {where}, which no hub does: the network, or its proxy, may want a login in a browser"
    # A mirror's own refusal is no page; a proxy's is.
    if status < 400 or (any_hub and not is_page):
        return None
    return f"{name} answers {said}, not as a hub does: a proxy refuses, or HF_ENDPOINT is wrong"
