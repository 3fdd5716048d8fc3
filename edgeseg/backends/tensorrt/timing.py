"""TensorRT's timing cache: kernel times measured once on a device, kept beside its engine folders for the next build.

``engines/.timing/Orin-8sm-8.7-tensorrt-10.3.0.cache`` is TensorRT's own file (``trtexec --timingCacheFile`` reads it); the
``.json`` beside it says what device and version it is of, and its hash. A cache that is damaged or of something
else is not used, and the build says so. Several builds at once add to one cache: each puts what it measured to what is
there when it is done.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from edgeseg.backends.cuda.driver import CudaDevice
from edgeseg.errors import ArtifactError, SpecError
from edgeseg.store.atomic import HeldError, lock, write_bytes
from edgeseg.store.documents import read_json, write_json
from edgeseg.store.hashing import FileRef

if TYPE_CHECKING:
    from tensorrt import IBuilderConfig

FOLDER_NAME = ".timing"
LOCK_SECONDS = 60.0
"""A lock is held for the time of reading and writing one file; whoever holds it longer hangs."""


@dataclass(frozen=True)
class CacheOrigin:
    """What a timing cache is measured on and by. All Orins have one name: their multiprocessors tell a Nano from an AGX."""

    gpu: str
    multiprocessors: int
    compute_capability: str
    tensorrt: str

    @property
    def file_name(self) -> str:
        gpu = re.sub(r"[^A-Za-z0-9.]+", "-", self.gpu).strip("-.") or "gpu"
        return f"{gpu}-{self.multiprocessors}sm-{self.compute_capability}-tensorrt-{self.tensorrt}.cache"


@dataclass(frozen=True)
class CacheFacts:
    """The ``.json`` beside a timing cache: what it is of, and its hash."""

    origin: CacheOrigin
    file: FileRef


class TimingCache:
    """The cache of one build.

    Args:
        path: the cache file; need not exist.
        origin: what a cache must be of; ``None`` for a file someone named, which TensorRT alone judges.

    Attributes:
        notes: why a cache was not used or not kept, one line each.
    """

    def __init__(self, path: Path, origin: CacheOrigin | None) -> None:
        self.path = path
        self.notes: list[str] = []
        self._origin = origin
        self._read = b""
        self._keep = True

    @classmethod
    def of_build(cls, option: bool | str, engines_folder: Path, gpu: CudaDevice, version: str) -> TimingCache | None:
        """The cache that option ``timing_cache`` asks for.

        Args:
            option: a file's name, ``True`` for the one beside the engine folders, ``False`` for none.
            engines_folder: the folder that holds engine folders.
            gpu: the device.
            version: of TensorRT.

        Raises:
            SpecError: something else than a file is named.
        """
        if option is False:
            return None
        if isinstance(option, str):
            if Path(option).exists() and not Path(option).is_file():
                raise SpecError(f"timing_cache {option} is a folder, pipe or device; give a file, or true")
            return cls(Path(option), None)
        origin = CacheOrigin(gpu.name, gpu.multiprocessors, gpu.capability_text, version)
        return cls(engines_folder / FOLDER_NAME / origin.file_name, origin)

    def give_to(self, config: IBuilderConfig) -> None:
        """Set what is kept, or an empty cache, as the builder's."""
        with self._reading():
            self._read = self._intact()
        cache = config.create_timing_cache(self._read)
        # The parameter says not to ignore that it was measured on another GPU or by another version.
        if cache is not None and config.set_timing_cache(cache, False):
            return
        if self._origin is None:
            # It may well serve the device it was measured on.
            self._keep = False
            self._note(
                f"timing cache {self.path} is damaged or of another GPU or TensorRT: not used, left as it is; "
                "name another file to have one of this device"
            )
        else:
            self._note(f"timing cache {self.path} was refused by TensorRT and is measured anew")
        self._read = b""
        config.set_timing_cache(config.create_timing_cache(b""), False)

    def keep_from(self, config: IBuilderConfig) -> None:
        """Write what the builder's cache holds now, joined with what other builds wrote meanwhile.

        A place that cannot be written is a note: the engine is complete without.
        """
        if not self._keep:
            return
        measured = config.get_timing_cache()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock():
                there = self._intact()
                if there != self._read:
                    others = config.create_timing_cache(there)
                    if others is None or not measured.combine(others, False):
                        self._note(f"timing cache {self.path} could not be joined with this build's; replaced")
                write_bytes(self.path, bytes(measured.serialize()))
                if self._origin is not None:
                    write_json(self._facts, CacheFacts(self._origin, FileRef.of(self.path)))
        except OSError as exc:
            why = exc.strerror or str(exc)
            self._note(
                f"kernel times are not kept for the next build: cannot write {self.path}: {why}; "
                "make it writable, or give --backend-option timing_cache=FILE"
            )
        except HeldError:
            self._note(f"kernel times are not kept for the next build: another program holds {self.path}")

    def _note(self, text: str) -> None:
        if text not in self.notes:  # the file is read before the build and after it
            self.notes.append(text)

    @property
    def _facts(self) -> Path:
        return self.path.with_suffix(".json")

    def _intact(self) -> bytes:
        """The file's bytes; ``b""`` when there is none, or when it is not what its ``.json`` says."""
        try:
            content = self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return b""
        except OSError as exc:
            self._note(f"timing cache {self.path} cannot be read ({exc.strerror}): not used")
            return b""
        if self._origin is None:
            return content
        try:
            said = read_json(self._facts, CacheFacts, "facts of the timing cache")
        except ArtifactError as exc:
            self._note(f"timing cache {self.path} is not used: {exc}")
            return b""
        if said.origin != self._origin:
            self._note(
                f"timing cache {self.path} is of {said.origin.gpu} ({said.origin.compute_capability}) and TensorRT "
                f"{said.origin.tensorrt}: not used, measured anew"
            )
            return b""
        if (len(content), sha256(content).hexdigest()) != (said.file.size_bytes, said.file.sha256):
            self._note(f"timing cache {self.path} is damaged: not used, measured anew")
            return b""
        return content

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        return lock(self.path.parent / f".{self.path.name}.lock", timeout_s=LOCK_SECONDS)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Keeps other builds from replacing one of the two files between the reads, where a lock can be had."""
        with contextlib.ExitStack() as stack:
            # A folder that cannot be written, or that is not there yet: nobody replaces anything in it.
            with contextlib.suppress(OSError):
                if self.path.is_file():
                    stack.enter_context(self._lock())
            yield
