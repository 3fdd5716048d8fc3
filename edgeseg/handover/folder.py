"""The folder an engine is handed over in: written whole or not at all, every file hashed in its ``handover.json``."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeseg.arguments import one_of
from edgeseg.errors import SpecError
from edgeseg.handover import deepness, deepstream, hub, isaac_ros, jetson_inference, triton
from edgeseg.handover.contents import Content
from edgeseg.store.atomic import atomic_folder, check_folder, listed_names
from edgeseg.store.documents import write_json
from edgeseg.store.engine import Engine, folder_of, open_engine
from edgeseg.store.hashing import FileRef
from edgeseg.store.manifest import MANIFEST_NAME
from edgeseg.version import __version__

LISTING_NAME = "handover.json"
SCHEMA_VERSION = 1

_PLAIN_HOSTS: Mapping[str, Callable[[Engine], dict[str, Content]]] = {
    "triton": triton.contents,
    "deepstream": deepstream.contents,
    "isaac-ros": isaac_ros.contents,
    "jetson-inference": jetson_inference.contents,
}
HOSTS = ("deepness", "hub", *_PLAIN_HOSTS)
"""That an engine can be handed over to."""


@dataclass(frozen=True)
class Listing:
    """``handover.json``.

    Attributes:
        schema_version: of this layout.
        host: what the folder is for.
        engine: name of the engine folder it was made of.
        engine_key: of that engine; see :attr:`~edgeseg.store.manifest.Manifest.engine_key`.
        files: every other file, by its path in the folder, with hash and size.
    """

    schema_version: int
    edgeseg_version: str
    host: str
    engine: str
    engine_key: str
    files: dict[str, FileRef]


def export_engine(
    folder: str | Path,
    host: str,
    output: str | Path,
    *,
    licence: str | None = None,
    picture: str | Path | None = None,
    resolution_cm: float | None = None,
    force: bool = False,
) -> Listing:
    """Write the engine in ``folder`` as ``host`` takes it to ``output``.

    Args:
        folder: an engine folder, or a file in it.
        host: one of :data:`HOSTS`.
        output: the new folder.
        licence: of the weights, for the hub's model card; the hub's own word, such as ``apache-2.0``.
        picture: an image to show with its mask, for the hub.
        resolution_cm: ground size of a pixel of the training images, centimetres, for ``deepness``.
        force: replace a folder that was handed over before.

    Raises:
        SpecError: an unknown host, or one that cannot run this engine, or something it needs was not said.
        BuildError: the graph made for the host does not give the engine's masks.
        ArtifactError: no engine folder, or one that was changed; the output cannot be written.
        InputError: the picture cannot be read.
    """
    one_of("host", host, HOSTS)
    output = Path(output)
    check_folder(output, force=force, ours=exported_files)
    engine = open_engine(folder_of(Path(folder)))
    if host != "hub" and (licence is not None or picture is not None):
        raise SpecError(f"--license and --picture are for the hub's model card; leave them out with --to {host}")
    if host != "deepness" and resolution_cm is not None:
        raise SpecError(f"--resolution is for deepness, which works on maps; leave it out with --to {host}")
    if host == "hub":
        contents = hub.contents(engine, licence, None if picture is None else Path(picture))
    elif host == "deepness":
        contents = deepness.contents(engine, resolution_cm)
    else:
        contents = _PLAIN_HOSTS[host](engine)
    contents.setdefault(MANIFEST_NAME, engine.folder / MANIFEST_NAME)
    with atomic_folder(output, force=force, ours=exported_files) as scratch:
        _write(scratch, contents)
        files = {name: FileRef.of(scratch / name) for name in sorted(contents)}
        listing = Listing(SCHEMA_VERSION, __version__, host, engine.manifest.name, engine.manifest.engine_key, files)
        write_json(scratch / LISTING_NAME, listing)
    return listing


def next_step(host: str, output: Path) -> str:
    """What to type next, for a person."""
    if host == "hub":
        return f"hf upload USER/MODEL {shlex.quote(str(output))}"
    if host == "triton":
        return f"tritonserver --model-repository {shlex.quote(str(output / triton.REPOSITORY))}"
    return f"start it as {shlex.quote(str(output / 'README.md'))} says"


def _write(scratch: Path, files: Mapping[str, Content]) -> None:
    for name, content in files.items():
        path = scratch / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, path)
        else:
            path.write_bytes(content)


def exported_files(folder: Path) -> frozenset[str] | None:
    """What an export wrote in ``folder``; ``None`` when it is not empty and none of ours."""
    return listed_names(folder, LISTING_NAME, Listing, lambda listing: listing.files)
