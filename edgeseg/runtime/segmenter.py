"""An engine that takes any image and answers with a mask of the image's size. Needs numpy, Pillow and one backend."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from copy import copy
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgeseg.arguments import choice, count_of, number, shortened
from edgeseg.backends import Session, get_backend
from edgeseg.backends.base import DeviceSession, PipelinedSession
from edgeseg.backends.cpu.options import with_streams, with_threads
from edgeseg.backends.signature import AUXILIARY
from edgeseg.closing import Closing
from edgeseg.errors import ArtifactError, EdgesegError, InputError, SpecError, StaleEngineError
from edgeseg.images.placement import Placement, Tiling, plan_fit
from edgeseg.runtime.averaging import AUGMENTATION, Augmentation, AveragedSession
from edgeseg.runtime.given import Given, ImageLike, accepted_order, given_images, reversed_channels, single_images
from edgeseg.runtime.prediction import Prediction, arrays_of, stacked
from edgeseg.runtime.scores import ScoreRule
from edgeseg.runtime.tiling import Part, RunRow, Strip, blended_strips, joined, stitched_strips
from edgeseg.spec import ChannelOrder, FitPolicy, PipelineSpec
from edgeseg.store.engine import Engine, folder_of, open_engine, read_manifest

if TYPE_CHECKING:
    from edgeseg.backends.cuda.arrays import DeviceTensor

TILE_OVERLAP = number(0, 0.9, "a share of the tile from 0 to 0.9")

Outputs = Mapping[str, NDArray[Any]]
ReadRow = Callable[[int, range], tuple[Sequence[int], NDArray[Any]]]


class Segmenter(Closing):
    """Images in, masks out. Safe to call from several threads: all of them share the one engine.

    Args:
        session: a loaded engine; the segmenter closes it.
        spec: the contract the engine fulfils.
        channel_order: order of the channels in the images given, ``rgb`` or ``bgr`` (OpenCV's).
        fit: how images of another size are brought to the engine's; ``None`` as the engine was calibrated and verified.
        tile_overlap: share of a tile that it has in common with its neighbour, from 0 to 0.9 (fit policy ``tile``).
        palette: uint8 ``(classes, 3)`` RGB colours for pictures; ``None`` for edgeseg's own.
        tta: test-time augmentation: average the probabilities of the image as it is and mirrored (``flips``: 4 runs), or
            mirrored and turned (``d4``: 8 runs, a square input). The engine has to return scores.

    Attributes:
        identity: what tells the engine from any other; ``None`` where nobody knows. Work that was interrupted goes on only
            with the same.

    Raises:
        SpecError: an option out of range; ``tta`` of an engine that returns masks, or ``d4`` of one that is not square.
        InputError: a palette of another shape.
    """

    def __init__(
        self,
        session: Session,
        spec: PipelineSpec,
        *,
        channel_order: ChannelOrder = "rgb",
        fit: FitPolicy | None = None,
        tile_overlap: float = 0.25,
        palette: NDArray[np.uint8] | None = None,
        tta: Augmentation | None = None,
    ) -> None:
        if tta is not None:
            session = AveragedSession([session], [spec], ["the engine"], AUGMENTATION.accept("tta", tta))
            spec = session.spec
        channel_order = accepted_order(channel_order, spec.input.channels)
        tile_overlap = TILE_OVERLAP.accept("tile_overlap", tile_overlap)
        self.spec = spec
        self.channel_order = channel_order
        self.identity: str | None = None
        self._session: Session | None = session
        self._input = (
            spec.input if fit is None else replace(spec.input, fit=choice(get_args(FitPolicy)).accept("fit", fit))
        )
        self._overlap = tile_overlap
        self._rule = None if spec.output.kind == "mask" else ScoreRule.of(spec)
        self._values = spec.model.classes if spec.model.task == "multiclass" else 2
        self._palette = None if palette is None else _checked_palette(palette, spec)
        single = spec.input.batch.minimum == 1 and not spec.input.dynamic_size and channel_order == "rgb"
        size = (spec.input.height, spec.input.width, spec.input.channels)
        # The shape that goes to the engine untouched; of float32, the values are looked at first.
        self._exact = size if single and self._rule is None and spec.input.dtype != "float32" else None

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise SpecError(
            "a Segmenter holds a loaded engine, which cannot be copied or sent to another process; send the folder, and call "
            "edgeseg.load there"
        )

    def __copy__(self) -> Segmenter:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def as_tiles(self) -> Segmenter:
        """The same engine with fit policy ``tile``; closed with this one. Without a largest size it takes windows of the
        size it was built for.
        """
        tiles = copy(self)
        most = (self._input.height, self._input.width) if self._input.dynamic_size else None
        tiles._input = replace(self._input, fit="tile", max_size=self._input.max_size or most)
        return tiles

    def plan(self, height: int, width: int) -> Placement | Tiling:
        """How an image of ``height`` x ``width`` pixels meets the engine's input."""
        return plan_fit(height, width, self._input, self._overlap)

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class; ``class 0``, ``class 1``, ... when the model has none."""
        return self.spec.model.names

    @property
    def palette(self) -> NDArray[np.uint8]:
        """Uint8 ``(values, 3)`` RGB: a colour for each value of the mask (multilabel: for each class)."""
        if self._palette is None:
            from edgeseg.runtime.overlay import spec_palette

            self._palette = spec_palette(self.spec)
        return self._palette

    def __repr__(self) -> str:
        closed = ", closed" if self._session is None else ""
        return f"<Segmenter {replace(self.spec, input=self._input).in_words}{closed}>"

    @overload
    def __call__(self, images: ImageLike, *, channel_order: ChannelOrder | None = None) -> NDArray[Any]: ...

    @overload
    def __call__(
        self, images: list[Any] | tuple[Any, ...], *, channel_order: ChannelOrder | None = None
    ) -> NDArray[Any] | list[NDArray[Any]]: ...

    def __call__(
        self, images: ImageLike | list[Any] | tuple[Any, ...], *, channel_order: ChannelOrder | None = None
    ) -> NDArray[Any] | list[NDArray[Any]]:
        """Segment one image or several.

        Args:
            images: ``(H, W, C)`` or ``(N, H, W, C)`` of any size; ``(H, W)`` too for a model with one channel. Of the
                engine's dtype, which is uint8 unless it was built for another; a float32 engine also takes other floats
                and signed integers. A numpy array, or what turns into one (a torch tensor on the CPU). Or the path of an
                image file, or a PIL image. Or a list of single images, of any of these kinds and of different sizes.
            channel_order: of arrays; ``None`` for the segmenter's. Files and PIL images know theirs.

        Returns:
            ``(H, W)`` or ``(N, H, W)`` class indices at the size of the images, uint8 (uint16 above 256 classes);
            binary: 0/1; multilabel: ``(C, H, W)`` or ``(N, C, H, W)`` of 0/1. For images of different sizes, a list
            with a mask for each. The caller owns the arrays.

        Raises:
            InputError: another dtype, shape or channel count; a file that cannot be read; a closed segmenter.
            ArtifactError: the engine gives a size or a class that its manifest does not know.
        """
        if (
            channel_order is None
            and type(images) is np.ndarray  # a masked array computes otherwise
            and images.shape == self._exact
            and images.dtype == self.spec.input.dtype
            and images.flags.c_contiguous
        ):
            batch = images[None]
            mask: NDArray[Any] = self._checked(self._open().run(batch), batch.shape[1:3])["mask"][0]
            return mask
        predictions, alone = self._segment(images, channel_order, mask_only=True)
        masks = [prediction.mask for prediction in predictions]
        if alone:
            return masks[0]
        return np.stack(masks) if len({mask.shape for mask in masks}) == 1 else masks

    @overload
    def predict(self, images: ImageLike, *, channel_order: ChannelOrder | None = None) -> Prediction: ...

    @overload
    def predict(
        self, images: list[Any] | tuple[Any, ...], *, channel_order: ChannelOrder | None = None
    ) -> Prediction | list[Prediction]: ...

    def predict(
        self, images: ImageLike | list[Any] | tuple[Any, ...], *, channel_order: ChannelOrder | None = None
    ) -> Prediction | list[Prediction]:
        """Segment one image or several and return everything the engine was built to say.

        Arguments and errors are those of calling the segmenter. Scores are resized bilinearly; the mask and the
        confidence are made of the resized scores. The confidence of a mask engine follows its mask, by nearest
        neighbour.
        """
        predictions, alone = self._segment(images, channel_order, mask_only=False)
        if alone:
            return predictions[0]
        return stacked(predictions) if len({p.mask.shape for p in predictions}) == 1 else predictions

    def run_device(self, images: object) -> Mapping[str, DeviceTensor]:
        """Segment images that are in the GPU's memory; the results stay there, nothing is copied or resized.

        Args:
            images: ``(H, W, C)`` or ``(N, H, W, C)`` of the engine's own size and dtype (float32 for uint16), in RGB, with
                ``__cuda_array_interface__`` or ``__dlpack__``.

        Returns:
            the engine's outputs by name (``mask``: ``(N, H, W)``), with the same interfaces; close each after use.

        Raises:
            SpecError: the engine's backend does not run on a GPU.
            InputError: not such an array, or not of a size the engine takes.
            DeviceError: the GPU refused.
        """
        session = self._open()
        if not isinstance(session, DeviceSession):
            raise SpecError(
                "this engine takes no images from a device's memory; a TensorRT engine alone, without tta, does"
            )
        return session.run_device(images)

    def many(
        self, images: Iterable[ImageLike], *, channel_order: ChannelOrder | None = None
    ) -> Generator[NDArray[Any], None, None]:
        """Segment image after image; masks in order, each as calling the segmenter gives it.

        A TensorRT engine copies one image to and from the GPU while it computes another. An image is therefore drawn
        before the mask of the one before is given.

        Raises:
            InputError: no iterable of images, or one that cannot be used.
        """
        if isinstance(images, (str, Path)) or not isinstance(images, Iterable):
            raise InputError(f"images are {shortened(images)}; give an iterable of images, such as [image]")
        session = self._open()
        pairs = (
            isinstance(session, PipelinedSession)
            and self._rule is None
            and self.spec.input.batch.minimum == 1
            and self._input.fit != "tile"
        )
        if not pairs:
            yield from (self(image, channel_order=channel_order) for image in images)
            return
        assert isinstance(session, PipelinedSession)
        plans: deque[tuple[Placement, bool]] = deque()

        def fitted() -> Iterator[NDArray[Any]]:
            for image in images:
                given = self._given(image, channel_order)
                batch = given.batch
                if len(batch) != 1:
                    raise InputError(f"images have shape {batch.shape}; give one image at a time")
                plan = self.plan(*batch.shape[1:3])
                assert not isinstance(plan, Tiling)
                plans.append((plan, given.alone))
                placed = batch if plan.is_identity else plan.apply(batch[0])[None]
                yield np.ascontiguousarray(reversed_channels(placed) if given.swap else placed)

        with closing(session.run_many(fitted())) as running:
            for outputs in running:
                plan, alone = plans.popleft()
                mask = plan.restore(self._checked(outputs, plan.canvas)["mask"][0])
                yield mask if alone else mask[None]

    def close(self) -> None:
        """Free the engine. Calling the segmenter afterwards is an :class:`InputError`."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _open(self) -> Session:
        if self._session is None:
            raise InputError("this Segmenter is closed; load the engine again")
        return self._session

    def _checked(self, outputs: Outputs, sides: tuple[int, ...]) -> Outputs:
        """Raise ``ArtifactError`` for outputs of another size than the images', ``sides``, which an engine may leave open
        until it runs, and for a class the manifest does not know: its names and counts are not this engine's.
        """
        for name, array in outputs.items():
            if name != AUXILIARY and array.shape[-2:] != sides:
                raise ArtifactError(
                    f"the engine's {name} is {array.shape} of images of {sides}: edited, or of another engine; "
                    "build it again"
                )
        masks = outputs.get("mask")
        if masks is not None and masks.size and (largest := int(masks.max())) >= self._values:
            raise ArtifactError(
                f"the engine's mask has the value {largest}, its manifest says {self._values} values "
                f"({self.spec.model.task}, {self.spec.model.classes} classes): edited, or of another engine; build it again"
            )
        return outputs

    def _swaps_channels(self, channel_order: ChannelOrder | None) -> bool:
        """Whether images of ``channel_order`` (``None``: the segmenter's) are turned for the engine, which takes RGB."""
        order = self.channel_order if channel_order is None else channel_order
        return accepted_order(order, self.spec.input.channels) == "bgr"

    def _segment(
        self, images: object, channel_order: ChannelOrder | None, *, mask_only: bool
    ) -> tuple[list[Prediction], bool]:
        """Predictions of all ``images``, and whether that is one image alone rather than a batch of one."""
        if not isinstance(images, (list, tuple)):
            given = self._given(images, channel_order)
            return list(self._predictions(given.batch, given.swap, mask_only=mask_only)), given.alone
        if not images:
            raise InputError("images are an empty list; give at least one image")
        step, predictions = self.spec.input.batch.maximum, list[Prediction]()
        singles = single_images(images, self.spec.input, swap=self._swaps_channels(channel_order))
        for _, alike in groupby(singles, key=lambda given: (given.batch.shape, given.swap)):
            # No more at a time than the engine takes: paths of files may be many.
            while part := list(islice(alike, step)):
                batch = part[0].batch if len(part) == 1 else np.concatenate([given.batch for given in part])
                predictions += self._predictions(batch, part[0].swap, mask_only=mask_only)
        return predictions, False

    def _given(self, images: object, channel_order: ChannelOrder | None) -> Given:
        return given_images(images, self.spec.input, swap=self._swaps_channels(channel_order))

    def _predictions(self, batch: NDArray[Any], swap: bool, *, mask_only: bool) -> Iterator[Prediction]:
        plan = self.plan(*batch.shape[1:3])
        if isinstance(plan, Tiling):
            for image in batch:
                yield self._tiled(image, plan, swap, mask_only)
            return
        step = self.spec.input.batch.maximum
        for start in range(0, len(batch), step):
            chunk = batch[start : start + step]
            if plan.is_identity:
                fitted = chunk
            elif len(chunk) == 1:  # as most are: no second copy
                fitted = plan.apply(chunk[0])[None]
            else:
                fitted = np.stack([plan.apply(image) for image in chunk])
            for outputs in self._run(fitted, swap):
                yield self._placed(outputs, plan, mask_only)

    def _run(self, images: NDArray[Any], swap: bool) -> Iterator[Outputs]:
        """Run images of the engine's size, in batches it accepts; yield the outputs of each without a batch axis."""
        session, limits = self._open(), self.spec.input.batch
        for start in range(0, len(images), limits.maximum):
            chunk = images[start : start + limits.maximum]
            count = len(chunk)
            if swap:
                chunk = reversed_channels(chunk)
            if count < limits.minimum:
                # The last image again: as likely as any to keep the engine on its usual path.
                chunk = np.concatenate((chunk, np.repeat(chunk[-1:], limits.minimum - count, axis=0)))
            outputs = self._checked(session.run(np.ascontiguousarray(chunk)), chunk.shape[1:3])
            for index in range(count):
                yield {name: array[index] for name, array in outputs.items()}

    def _placed(self, outputs: Outputs, place: Placement, mask_only: bool) -> Prediction:
        aux = outputs.get("aux_logits")
        if self._rule is None:
            confidence = None if mask_only else outputs.get("confidence")
            return Prediction(
                mask=place.restore(outputs["mask"]),
                confidence=None if confidence is None else place.restore(confidence, nearest=True),
                aux_logits=aux,
            )
        scores = outputs[self.spec.output.kind]
        mask = self._rule.mask_at_source(scores, place)
        if mask_only:
            return Prediction(mask)
        return self._scored(self._rule, place.restore(scores), mask, aux)

    def strips(
        self, tiling: Tiling, windows: ReadRow, part: Part | None = None, *, mask_only: bool = False
    ) -> Iterator[tuple[Strip, Prediction | None]]:
        """Segment an image that need not be in memory, window by window, as fit policy ``tile`` segments one that is.

        Args:
            tiling: of the image.
            windows: reads windows of one row, given its index and columns: those that are worth it,
                ``(windows, H, W, C)`` of the engine's dtype with RGB order, and their columns.
            part: of the image; ``None`` for all of it.
            mask_only: leave out everything but the mask.

        Yields:
            from top to bottom each finished piece, and the prediction for it; ``None`` where no window was read yet. The
            auxiliary head is left out.
        """

        def run(row: int, columns: range) -> Iterator[tuple[int, Outputs]]:
            wanted, images = windows(row, columns)
            yield from zip(wanted, self._run(images, swap=False), strict=True)

        return self._strips(run, tiling, part, mask_only=mask_only)

    def _strips(
        self, run: RunRow, tiling: Tiling, part: Part | None, *, mask_only: bool
    ) -> Iterator[tuple[Strip, Prediction | None]]:
        if self._rule is None:
            names = ("mask", "confidence") if self.spec.output.confidence and not mask_only else ("mask",)
            for strip in stitched_strips(run, tiling, names, part):
                yield strip, Prediction(**strip.outputs) if strip.outputs else None
            return
        kind = self.spec.output.kind
        for strip in blended_strips(run, tiling, (kind,), part):
            scores = strip.outputs.get(kind)
            if scores is None:
                yield strip, None
                continue
            mask = self._rule.mask(scores)
            yield strip, Prediction(mask) if mask_only else self._scored(self._rule, scores, mask, None)

    def _tiled(self, image: NDArray[Any], tiling: Tiling, swap: bool, mask_only: bool) -> Prediction:
        aux: list[NDArray[np.float32]] = []
        padded = tiling.pad(image)

        def run(row: int, columns: range) -> Iterator[tuple[int, Outputs]]:
            for column, outputs in zip(columns, self._run(tiling.row(padded, row), swap), strict=True):
                if "aux_logits" in outputs:
                    aux.append(outputs["aux_logits"])
                yield column, outputs

        strips = self._strips(run, tiling, None, mask_only=mask_only)
        whole = joined(((strip.rows, arrays_of(prediction)) for strip, prediction in strips), tiling.source[0])
        return Prediction(**whole, aux_logits=_mean(aux))

    def _scored(
        self, rule: ScoreRule, scores: NDArray[np.float32], mask: NDArray[Any], aux: NDArray[np.float32] | None
    ) -> Prediction:
        kind, confident = self.spec.output.kind, self.spec.output.confidence
        return Prediction(
            mask=mask,
            confidence=rule.confidence(scores, mask) if confident else None,
            probabilities=scores if kind == "probabilities" else None,
            logits=scores if kind == "logits" else None,
            aux_logits=aux,
        )


def load(
    folder: str | Path | Engine,
    *,
    channel_order: ChannelOrder = "rgb",
    fit: FitPolicy | None = None,
    tile_overlap: float = 0.25,
    palette: NDArray[np.uint8] | None = None,
    recompile: bool = False,
    streams: int | None = None,
    threads: int | None = None,
    tta: Augmentation | None = None,
    ensemble: str | Path | Engine | Sequence[str | Path | Engine] = (),
) -> Segmenter:
    """Load an engine folder. torch, onnx and SMP are not imported.

    Args:
        folder: made by ``edgeseg build`` or ``edgeseg compile``, or a file in it; its hashes are checked.
        channel_order: see :class:`Segmenter`.
        fit: see :class:`Segmenter`.
        tile_overlap: see :class:`Segmenter`.
        palette: see :class:`Segmenter`.
        recompile: when the engine was built for another device or version, build it again from the folder's graph
            (what ``edgeseg compile`` does; minutes for TensorRT) and go on. A damaged folder stays an error.
        streams: threads that will call the segmenter at the same time: ONNX Runtime and OpenVINO divide their threads
            among them, for more images a second, each mask later. ``None``: what the engine was built for.
        threads: that ONNX Runtime or OpenVINO may use at most, where others share the machine; ``None``: as built.
        tta: see :class:`Segmenter`.
        ensemble: a further engine folder or several, of the same classes, input and threshold, all with scores: the
            probabilities of all are averaged.

    Raises:
        ArtifactError: no engine folder, or a damaged, stale or foreign one.
        BuildError: the backend cannot load the engine.
        MissingDependencyError: the backend is not installed.
        SpecError, InputError: see :class:`Segmenter`.
    """
    streams = (
        None if streams is None else count_of("streams", streams, 1, "the number of threads that will call, from 1")
    )
    threads = None if threads is None else count_of("threads", threads, 0, "a number from 0 (one per core), such as 2")
    if isinstance(ensemble, (str, os.PathLike, Engine)):
        ensemble = (ensemble,)
    engines = list[tuple[Engine, Session]]()
    try:
        for given in (folder, *ensemble):
            if isinstance(given, Engine):
                engines.append((given, _loaded(given, recompile, streams, threads)))
            else:
                engines.append(_loaded_whole(_folder_of(given), recompile, streams, threads))
        manifests = [engine.manifest for engine, _ in engines]
        (_, session), spec = engines[0], manifests[0].spec
        if ensemble:
            names = [str(engine.folder) for engine, _ in engines]
            session = AveragedSession([s for _, s in engines], [manifest.spec for manifest in manifests], names)
            spec = session.spec
        segmenter = Segmenter(
            session, spec, channel_order=channel_order, fit=fit, tile_overlap=tile_overlap, palette=palette, tta=tta
        )
    except BaseException:
        for _, session in engines:
            session.close()
        raise
    segmenter.identity = hashlib.sha256(msgspec.json.encode((manifests, tta))).hexdigest()
    return segmenter


def _loaded_whole(folder: Path, recompile: bool, streams: int | None, threads: int | None) -> tuple[Engine, Session]:
    """Open an engine folder that may be replaced meanwhile: the session is of the very engine that was checked."""
    while True:
        engine = open_engine(folder)
        try:
            session = _loaded(engine, recompile, streams, threads)
        except EdgesegError:
            if read_manifest(folder) == engine.manifest:
                raise
            continue
        now = read_manifest(folder)
        # Compiled again by us, perhaps: the graph is the same then.
        if now.spec == engine.manifest.spec and now.graph == engine.manifest.graph:
            return engine, session
        session.close()


def _folder_of(given: object) -> Path:
    if not isinstance(given, str | os.PathLike) or given == "":
        raise SpecError(f"folder is {shortened(given)}; give the path of an engine folder")
    return folder_of(Path(given))


def _loaded(engine: Engine, recompile: bool, streams: int | None, threads: int | None) -> Session:
    backend = get_backend(engine.manifest.target)
    try:
        return backend.load(with_threads(with_streams(engine, streams), threads))
    except StaleEngineError:
        if not recompile:
            raise
    from edgeseg.backends.compile import recompile as compile_again

    return backend.load(with_threads(with_streams(compile_again(engine), streams), threads))


def _mean(arrays: list[NDArray[np.float32]]) -> NDArray[np.float32] | None:
    return np.mean(arrays, axis=0, dtype=np.float32) if arrays else None


def _checked_palette(palette: object, spec: PipelineSpec) -> NDArray[np.uint8]:
    needed = 2 if spec.model.task == "binary" else spec.model.classes
    if not isinstance(palette, np.ndarray):
        raise InputError(f"palette is {shortened(palette)}; give a uint8 array ({needed}, 3), RGB per mask value")
    if palette.dtype != np.uint8 or palette.ndim != 2 or palette.shape[1] != 3 or len(palette) < needed:
        raise InputError(f"palette is {palette.dtype} {palette.shape}; give uint8 ({needed}, 3), RGB per mask value")
    return np.ascontiguousarray(palette)
