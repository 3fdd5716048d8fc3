"""The segmenter around an engine that is a plain function: what goes in, how it is split, what comes out."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_backend import MemoryBackend, MemorySession, write_memory_engine
from PIL import Image

from edgeseg import backends
from edgeseg.errors import ArtifactError, InputError, SpecError
from edgeseg.images.placement import fit
from edgeseg.runtime.segmenter import Segmenter, load
from edgeseg.spec import BatchRange, InputSpec, ModelSpec, OutputSpec, PipelineSpec, Preprocess
from edgeseg.store.engine import Engine, engine_folder

RNG = np.random.default_rng(11)
POLICIES = ("resize", "letterbox", "tile")
KINDS = ("mask", "logits", "probabilities")
TASKS = ("multiclass", "binary", "multilabel")


def make_spec(
    *,
    task: str = "multiclass",
    classes: int = 5,
    channels: int = 3,
    kind: str = "mask",
    confidence: bool = False,
    threshold: float = 0.5,
    **options: object,
) -> PipelineSpec:
    size = {"height": 32, "width": 48, "stride": 16, **options}
    return PipelineSpec(
        ModelSpec("custom", classes=1 if task == "binary" else classes, task=task, in_channels=channels),
        InputSpec(channels=channels, **size),
        Preprocess(mean=(0.5,) * channels, std=(0.5,) * channels),
        OutputSpec(kind, confidence, threshold),
    )


def photo(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def bands(images: np.ndarray, classes: int = 5) -> np.ndarray:
    """The class the memory engine promises, by its documented rule, in whole numbers."""
    total = images.astype(np.int64).sum(axis=-1)
    return total * classes // (256 * images.shape[-1])


# Any image in, a mask of its size out


@settings(max_examples=80, deadline=None)
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    policy=st.sampled_from(POLICIES),
    kind=st.sampled_from(KINDS),
    task=st.sampled_from(TASKS),
    dynamic=st.booleans(),
)
def test_a_mask_of_the_size_of_the_image(
    size: tuple[int, int], policy: str, kind: str, task: str, dynamic: bool
) -> None:
    spec = make_spec(task=task, kind=kind, fit=policy, dynamic_size=dynamic, max_size=(64, 64) if dynamic else None)
    mask = Segmenter(MemorySession(spec), spec)(photo(*size, 3))
    assert mask.shape == ((5, *size) if task == "multilabel" else size)
    assert mask.dtype == np.uint8
    assert mask.max() <= (4 if task == "multiclass" else 1)


@settings(max_examples=60, deadline=None)
@given(size=st.tuples(st.integers(1, 120), st.integers(1, 120)), kind=st.sampled_from(KINDS), overlap=st.floats(0, 0.9))
def test_tiles_give_the_mask_of_the_whole_image(size: tuple[int, int], kind: str, overlap: float) -> None:
    spec = make_spec(kind=kind, fit="tile")
    image = photo(*size, 3)
    mask = Segmenter(MemorySession(spec), spec, tile_overlap=overlap)(image)
    expected = bands(image)
    # A blend of equal scores may round across a band's border; brightness is a multiple of 1/3.
    on_border = image.astype(int).sum(axis=-1) * 5 % 768 < 6
    np.testing.assert_array_equal(mask[~on_border], expected[~on_border])
    if kind == "mask":
        np.testing.assert_array_equal(mask, expected)


@settings(max_examples=60, deadline=None)
@given(size=st.tuples(st.integers(1, 120), st.integers(1, 120)), kind=st.sampled_from(KINDS))
def test_a_dynamic_size_never_resamples(size: tuple[int, int], kind: str) -> None:
    spec = make_spec(kind=kind, dynamic_size=True)
    session = MemorySession(spec)
    image = photo(*size, 3)
    np.testing.assert_array_equal(Segmenter(session, spec)(image), bands(image))
    assert session.calls == [(1, -(-size[0] // 16) * 16, -(-size[1] // 16) * 16, 3)]


def test_the_exact_size_is_not_copied() -> None:
    spec = make_spec()
    image, seen = photo(32, 48, 3), []

    def logits(images: np.ndarray) -> np.ndarray:
        seen.append(np.shares_memory(images, image))
        return np.zeros((1, 5, 32, 48), np.float32)

    Segmenter(MemorySession(spec, logits), spec)(image)
    assert seen == [True]


def test_mask_engines_are_enlarged_by_whole_pixels() -> None:
    spec = make_spec(height=16, width=16)
    image = photo(48, 32, 3)
    fitted, _ = fit(image, spec.input)
    mask = Segmenter(MemorySession(spec), spec)(image)
    np.testing.assert_array_equal(mask, bands(fitted).repeat(3, axis=0).repeat(2, axis=1))


def test_scores_are_resized_before_the_decision() -> None:
    """Two columns of scores enlarged: the border lies where the blend crosses, not on a pixel edge of the engine."""
    spec = make_spec(kind="logits", classes=2, height=1, width=2, stride=1)
    scores = np.array([[[3.0, 0.0]], [[0.0, 1.0]]], np.float32)  # class, row, column

    def logits(images: np.ndarray) -> np.ndarray:
        return scores[None]

    mask = Segmenter(MemorySession(spec, logits), spec)(photo(1, 200, 3))
    # Between the centres (columns 49.5 and 149.5) class 0 falls from 3 to 0, class 1 rises from 0 to 1: equal at 3/4.
    assert np.flatnonzero(mask[0]).min() == pytest.approx(49.5 + 100 * 0.75, abs=1)


# Batches


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("batch", [BatchRange(4, 4, 4), BatchRange(1, 2, 4), BatchRange(2, 3, 4), BatchRange()])
def test_batches_are_split_and_filled(kind: str, count: int, batch: BatchRange) -> None:
    spec = make_spec(kind=kind, batch=batch)
    session = MemorySession(spec)
    images = photo(count, 32, 48, 3)
    masks = Segmenter(session, spec)(images)
    np.testing.assert_array_equal(masks, bands(images))
    sizes = [call[0] for call in session.calls]
    assert len(sizes) == -(-count // batch.maximum)
    assert sum(sizes) <= max(count, batch.minimum) + batch.minimum - 1


def test_a_batch_of_another_size_equals_its_images() -> None:
    for policy in POLICIES:
        spec = make_spec(fit=policy, batch=BatchRange(1, 2, 3))
        segmenter = Segmenter(MemorySession(spec), spec)
        images = photo(4, 70, 33, 3)
        np.testing.assert_array_equal(segmenter(images), np.stack([segmenter(image) for image in images]))


def test_tiles_use_the_batch() -> None:
    spec = make_spec(fit="tile", batch=BatchRange(1, 4, 4))
    session = MemorySession(spec)
    Segmenter(session, spec, tile_overlap=0.0)(photo(64, 48 * 6, 3))
    assert [call[0] for call in session.calls] == [4, 2, 4, 2]


# Channels


def test_bgr_is_turned_into_rgb_for_the_engine() -> None:
    spec = make_spec(fit="letterbox")

    def red(images: np.ndarray) -> np.ndarray:
        return np.eye(5, dtype=np.float32)[images[..., 0] // 52].transpose(0, 3, 1, 2)

    for size in ((32, 48), (64, 96), (20, 90)):
        image = photo(*size, 3)
        expected = Segmenter(MemorySession(spec, red), spec)(image)
        bgr = Segmenter(MemorySession(spec, red), spec, channel_order="bgr")
        np.testing.assert_array_equal(bgr(image[..., ::-1]), expected)
        np.testing.assert_array_equal(bgr(np.ascontiguousarray(image[..., ::-1])), expected)
        np.testing.assert_array_equal(bgr(image, channel_order="rgb"), expected)
        np.testing.assert_array_equal(bgr.predict(image, channel_order="rgb").mask, expected)


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
@pytest.mark.parametrize("size", [(32, 48), (50, 20)])
def test_other_channel_counts(channels: int, size: tuple[int, int]) -> None:
    spec = make_spec(channels=channels, fit="tile")
    segmenter = Segmenter(MemorySession(spec), spec)
    image = photo(*size, channels)
    np.testing.assert_array_equal(segmenter(image), bands(image))
    with pytest.raises(SpecError, match="bgr means 3 channels"):
        segmenter(image, channel_order="bgr")


class PairingSession(MemorySession):
    """Takes images one after another, as a TensorRT session does."""

    def run_many(self, batches: Iterable[np.ndarray]) -> Generator[Mapping[str, np.ndarray], None, None]:
        for batch in batches:
            yield self.run(batch)


@pytest.mark.parametrize("session", [MemorySession, PairingSession])
def test_many_images_and_one_are_checked_alike(session: type[MemorySession]) -> None:
    colour = Segmenter(session(make_spec()), make_spec())
    image = photo(32, 48, 3)
    np.testing.assert_array_equal(next(colour.many([image], channel_order="bgr")), colour(image[..., ::-1]))
    for channels in (1, 2, 4):
        spec = make_spec(channels=channels)
        engine = session(spec)
        with pytest.raises(SpecError, match=f"bgr means 3 channels, this model takes {channels}"):
            list(Segmenter(engine, spec).many([photo(32, 48, channels)], channel_order="bgr"))
        assert engine.calls == []
        with pytest.raises(SpecError, match="bgr means 3 channels"):
            Segmenter(session(spec), spec, channel_order="bgr")


@pytest.mark.parametrize("images", ["a.png", Path("a.png"), None, 3])
def test_many_takes_an_iterable_of_images(images: object) -> None:
    segmenter = Segmenter(MemorySession(make_spec()), make_spec())
    with pytest.raises(InputError, match=r"^images are .*; give an iterable of images, such as \[image\]$"):
        list(segmenter.many(images))  # type: ignore[arg-type]


def test_grey_images_need_no_channel_axis() -> None:
    spec = make_spec(channels=1)
    segmenter = Segmenter(MemorySession(spec), spec)
    image = photo(32, 48)
    np.testing.assert_array_equal(segmenter(image), bands(image[..., None]))


class OnTheGpu:
    def __array__(self) -> np.ndarray:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu()")


class Tensor:
    """What a torch tensor on the CPU offers, as far as it is used."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype: object = None) -> np.ndarray:
        return self.array


@pytest.mark.parametrize("kind", KINDS)
def test_files_pictures_tensors_and_lists_are_images_too(tmp_path: Path, kind: str) -> None:
    """Files and PIL images are RGB whatever order the arrays have."""
    spec = make_spec(kind=kind, batch=BatchRange(1, 2, 2))

    def red(images: np.ndarray) -> np.ndarray:
        return np.eye(5, dtype=np.float32)[images[..., 0] // 52].transpose(0, 3, 1, 2)

    image, path = photo(40, 60, 3), tmp_path / "a.png"
    Image.fromarray(image).save(path)
    picture, bgr = Image.open(path), image[..., ::-1]
    expected = Segmenter(MemorySession(spec, red), spec)(image)
    session = MemorySession(spec, red)
    with Segmenter(session, spec, channel_order="bgr") as segmenter:
        for one in (path, str(path), picture, bgr, Tensor(bgr)):
            np.testing.assert_array_equal(segmenter(one), expected)
            np.testing.assert_array_equal(segmenter.predict(one).mask, expected)
        assert segmenter.predict([path]).mask.shape == (1, 40, 60)
        session.calls.clear()
        masks = segmenter([path, picture, bgr, Tensor(bgr), str(path)])
        assert [shape[0] for shape in session.calls] == [2, 2, 1]
        np.testing.assert_array_equal(masks, np.stack([expected] * 5))
        np.testing.assert_array_equal(next(segmenter.many([path])), expected)
        # Of different sizes: a list, in order, each as alone.
        small = photo(20, 30, 3)
        mixed = segmenter([small, path, (small.copy())])
        assert isinstance(mixed, list)
        for mask, one in zip(mixed, (small, path, small), strict=True):
            np.testing.assert_array_equal(mask, segmenter(one))
        assert [p.mask.shape for p in segmenter.predict((small, path))] == [(20, 30), (40, 60)]  # type: ignore[union-attr]
    picture.close()


def test_a_picture_given_is_not_changed(tmp_path: Path) -> None:
    spec = make_spec()
    turned = Image.fromarray(photo(20, 30, 3))
    turned.getexif()[274] = 6
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    with Image.open(tmp_path / "turned.jpg") as picture, Segmenter(MemorySession(spec), spec) as segmenter:
        mask = segmenter(picture)
        assert (mask.shape, picture.size) == ((30, 20), (30, 20))
        np.testing.assert_array_equal(mask, segmenter(tmp_path / "turned.jpg"))
        broken = tmp_path / "broken.png"
        Image.fromarray(photo(50, 60, 3)).save(broken)
        broken.write_bytes(broken.read_bytes()[:-4000])
        with Image.open(broken) as half, pytest.raises(InputError, match=r"broken.png: .*truncated"):
            segmenter(half)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (photo(32, 48), r"shape \(32, 48\); give uint8 \(H, W, 3\) or \(N, H, W, 3\)"),
        (photo(32, 48, 4), "4 channels; this model takes 3"),
        (photo(32, 48, 1), "1 channels; this model takes 3"),
        (photo(2, 2, 32, 48, 3), "shape"),
        (photo(0, 48, 3), "shape"),
        (photo(0, 32, 48, 3), "shape"),
        (np.zeros((32, 48, 3), np.float32), r"float32, .*\(x \* 255\)"),
        (np.zeros((32, 48, 3), np.uint16), r"uint16, .*x >> 8"),
        (np.zeros((32, 48, 3), np.int64), "int64, .*astype"),
        (np.zeros((32, 48, 3), bool), "bool"),
        ([[[0, 0, 0]]], "a list; give a numpy array"),
        (None, "the image is None, which cv2.imread returns"),
        ([photo(32, 48, 3), None], "image 1 of 2: the image is None"),
        ([photo(2, 32, 48, 3)], r"image 0 of 1 has shape \(2, 32, 48, 3\); a list holds single images"),
        ([], "empty list"),
        ("no/such.png", "no/such.png: it does not exist"),
        (photo(3, 32, 48), r"channels come first: images.transpose\(1, 2, 0\)"),
        (photo(1, 3, 32, 48), r"channels come first: images.transpose\(0, 2, 3, 1\)"),
        (OnTheGpu(), "a OnTheGpu .*use Tensor.cpu.*on the CPU"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(image: object, words: str) -> None:
    spec = make_spec()
    session = MemorySession(spec)
    for method in (Segmenter(session, spec), Segmenter(session, spec).predict):
        with pytest.raises(InputError, match=words) as caught:
            method(image)
        assert "\n" not in str(caught.value)
    assert session.calls == []


@pytest.mark.parametrize(
    "view",
    [lambda a: a[::-1], lambda a: a[:, ::2], lambda a: np.asfortranarray(a), lambda a: a.transpose(1, 0, 2)],
)
def test_views_are_as_good_as_arrays(view: Callable[[np.ndarray], np.ndarray]) -> None:
    spec = make_spec(fit="tile")
    image = view(photo(32, 48, 3))
    np.testing.assert_array_equal(Segmenter(MemorySession(spec), spec)(image), bands(image))


@pytest.mark.parametrize("size", [(32, 48), (61, 45)])
def test_a_masked_array_is_its_values(size: tuple[int, int]) -> None:
    """As rasterio reads with ``masked=True``; resizing in place would end in numpy's own error."""
    spec = make_spec()
    image = photo(*size, 3)
    segmenter = Segmenter(MemorySession(spec), spec)
    masked = np.ma.masked_array(image, image > 100)
    np.testing.assert_array_equal(segmenter(masked), segmenter(image))
    assert type(segmenter(masked)) is np.ndarray


def test_a_read_only_image_is_fine_and_stays_as_it_was() -> None:
    for size in ((32, 48), (64, 50)):
        for order in ("rgb", "bgr"):
            spec = make_spec()
            image = photo(*size, 3)
            before = image.copy()
            image.setflags(write=False)
            Segmenter(MemorySession(spec), spec, channel_order=order)(image)
            np.testing.assert_array_equal(image, before)


# Predictions


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("confidence", [True, False])
def test_a_prediction_holds_what_the_engine_was_built_for(task: str, kind: str, policy: str, confidence: bool) -> None:
    spec = make_spec(task=task, kind=kind, fit=policy, confidence=confidence, batch=BatchRange(1, 2, 2))
    segmenter = Segmenter(MemorySession(spec, aux_logits=lambda i: i.mean(axis=(1, 2), dtype=np.float32)), spec)
    for images in (photo(60, 70, 3), photo(3, 20, 30, 3), photo(32, 48, 3)):
        prediction = segmenter.predict(images)
        size, lead = images.shape[-3:-1], images.shape[:-3]
        planes = (1 if task == "binary" else 5,)
        np.testing.assert_array_equal(prediction.mask, segmenter(images))
        shape = (*lead, 5, *size) if task == "multilabel" else (*lead, *size)
        assert prediction.mask.shape == shape
        assert (None if prediction.confidence is None else prediction.confidence.shape) == (
            shape if confidence else None
        )
        for name in ("logits", "probabilities"):
            scores = getattr(prediction, name)
            assert (scores is None) == (kind != name)
            assert scores is None or (scores.shape, scores.dtype) == ((*lead, *planes, *size), np.float32)
        assert prediction.aux_logits is not None
        assert prediction.aux_logits.shape == (*lead, 3)
        assert prediction.aux_logits.dtype == np.float32


def test_probabilities_and_confidence_agree_with_the_mask() -> None:
    spec = make_spec(kind="probabilities", confidence=True)
    prediction = Segmenter(MemorySession(spec), spec).predict(photo(100, 90, 3))
    assert prediction.probabilities is not None
    assert prediction.confidence is not None
    np.testing.assert_allclose(prediction.probabilities.sum(axis=0), 1, atol=1e-5)
    np.testing.assert_array_equal(prediction.mask, prediction.probabilities.argmax(axis=0))
    np.testing.assert_allclose(prediction.confidence, prediction.probabilities.max(axis=0))


def test_tiles_average_the_auxiliary_head() -> None:
    spec = make_spec(fit="tile")
    image = np.zeros((32, 96, 3), np.uint8)
    image[:, 48:] = 100
    session = MemorySession(spec, aux_logits=lambda i: i.mean(axis=(1, 2), dtype=np.float32))
    prediction = Segmenter(session, spec, tile_overlap=0.0).predict(image)
    np.testing.assert_allclose(prediction.aux_logits, [50, 50, 50])


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_threshold_of_a_binary_model(threshold: float, kind: str) -> None:
    spec = make_spec(task="binary", kind=kind, threshold=threshold)
    image = photo(32, 48, 3)
    probability = 1 / (1 + np.exp(-(image.mean(axis=-1, dtype=np.float64) - 127.5) / 32))
    np.testing.assert_array_equal(Segmenter(MemorySession(spec), spec)(image), probability > threshold)


def test_more_than_256_classes_are_uint16() -> None:
    for kind in KINDS:
        spec = make_spec(classes=300, kind=kind)
        for size in ((32, 48), (40, 50)):
            image = photo(*size, 3)
            mask = Segmenter(MemorySession(spec), spec)(image)
            assert mask.dtype == np.uint16
            assert mask.shape == size
    np.testing.assert_array_equal(Segmenter(MemorySession(spec), spec)(image[:32, :48]), bands(image[:32, :48], 300))


def test_results_belong_to_the_caller() -> None:
    spec = make_spec()
    segmenter = Segmenter(MemorySession(spec), spec)
    for size in ((32, 48), (33, 47)):
        image = photo(*size, 3)
        first = segmenter(image)
        expected = first.copy()
        first[:] = 99
        np.testing.assert_array_equal(segmenter(image), expected)


# Threads, life time, loading


def test_closing_closes_the_session_and_refuses_calls() -> None:
    spec = make_spec()
    session = MemorySession(spec)
    with Segmenter(session, spec) as segmenter:
        segmenter(photo(32, 48, 3))
    assert session.closed
    segmenter.close()
    for size in ((32, 48), (10, 10)):
        with pytest.raises(InputError, match="closed"):
            segmenter(photo(*size, 3))


def test_options_out_of_range() -> None:
    spec = make_spec()
    wrong = ({"channel_order": "gbr"}, {"channel_order": 3}, {"fit": "crop"}, {"fit": 3})
    for options in (*wrong, {"tile_overlap": 1.0}, {"tile_overlap": -0.1}):
        with pytest.raises(SpecError):
            Segmenter(MemorySession(spec), spec, **options)
    with pytest.raises(InputError, match=r"give uint8 \(5, 3\)"):
        Segmenter(MemorySession(spec), spec, palette=np.zeros((4, 3), np.uint8))
    with pytest.raises(SpecError, match="channel order"):
        Segmenter(MemorySession(spec), spec)(photo(32, 48, 3), channel_order="xyz")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tile_overlap": "much"}, "tile_overlap is 'much'; give a share of the tile from 0 to 0.9"),
        ({"palette": 5}, r"palette is 5; give a uint8 array \(5, 3\)"),
        ({"palette": [[0, 0, 0]] * 5}, r"palette is \[\[0, 0.*; give a uint8 array \(5, 3\)"),
    ],
)
def test_options_of_another_kind(options: dict[str, object], words: str) -> None:
    spec = make_spec()
    with pytest.raises((SpecError, InputError), match=words):
        Segmenter(MemorySession(spec), spec, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("send", [pickle.dumps, copy.deepcopy])
def test_what_is_sent_to_another_process_is_the_folder(send: Callable[[object], object]) -> None:
    spec = make_spec()
    with pytest.raises(SpecError, match="send the folder, and call edgeseg.load there"):
        send(Segmenter(MemorySession(spec), spec))


def test_names_of_choices_ignore_case() -> None:
    spec, image = make_spec(), photo(32, 48, 3)
    expected = Segmenter(MemorySession(spec), spec)(image[..., ::-1])
    loud = Segmenter(MemorySession(spec), spec, channel_order="BGR", fit="Resize")
    np.testing.assert_array_equal(loud(image), expected)
    np.testing.assert_array_equal(next(loud.many([image], channel_order="Bgr")), expected)


@pytest.mark.parametrize("given", [None, 3, [], object()])
def test_what_is_no_path_is_no_engine_folder(given: object) -> None:
    with pytest.raises(SpecError, match=r"^folder is .*; give the path of an engine folder$"):
        load(given)


def test_names_and_colours() -> None:
    spec = make_spec()
    segmenter = Segmenter(MemorySession(spec), spec)
    assert segmenter.class_names == ("class 0", "class 1", "class 2", "class 3", "class 4")
    assert segmenter.palette.shape == (5, 3)
    named = PipelineSpec(ModelSpec("custom", classes=2, class_names=("void", "road")))
    colours = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    assert Segmenter(MemorySession(named), named).class_names == ("void", "road")
    np.testing.assert_array_equal(Segmenter(MemorySession(named), named, palette=colours).palette, colours)


def test_load_follows_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "memory", "memory_backend")
    spec = make_spec(fit="tile")
    engine = write_memory_engine(tmp_path / "engine", spec)
    image = photo(50, 60, 3)
    with load(str(tmp_path / "engine")) as segmenter:
        assert segmenter.spec == spec
        np.testing.assert_array_equal(segmenter(image), bands(image))
    with load(engine, fit="resize") as segmenter:
        assert segmenter(image).shape == (50, 60)
        assert not np.array_equal(segmenter(image), bands(image))
    engine.engine_path.write_text("{}")
    with pytest.raises(ArtifactError, match="edited"):
        load(tmp_path / "engine")
    with pytest.raises(ArtifactError, match="not an engine folder"):
        load(tmp_path / "missing")


def test_a_file_of_the_folder_stands_for_it_and_objects_say_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backends.BACKENDS, "memory", "memory_backend")
    engine = write_memory_engine(tmp_path / "engine", make_spec(fit="tile"))
    for name in ("manifest.json", engine.engine_path.name):
        with load(tmp_path / "engine" / name, fit="resize") as segmenter:
            assert repr(segmenter) == "<Segmenter custom-resnet34, 5 classes, 32x48 RGB (resize) -> mask>"
    assert repr(segmenter) == "<Segmenter custom-resnet34, 5 classes, 32x48 RGB (resize) -> mask, closed>"
    assert repr(engine) == (
        f"<Engine {tmp_path / 'engine'}: custom-resnet34, 5 classes, 32x48 RGB (tile) -> mask, fp32 for memory>"
    )
    (tmp_path / "other.onnx").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="not an engine folder"):
        load(tmp_path / "other.onnx")


def test_load_closes_the_session_when_an_option_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import memory_backend as memory

    sessions = []

    class Recording(memory.MemorySession):
        def __init__(self, spec: PipelineSpec) -> None:
            super().__init__(spec)
            sessions.append(self)

    monkeypatch.setitem(backends.BACKENDS, "memory", "memory_backend")
    monkeypatch.setattr(memory, "MemorySession", Recording)
    engine = write_memory_engine(tmp_path / "engine", make_spec())
    with pytest.raises(SpecError):
        load(engine, tile_overlap=3.0)
    assert [session.closed for session in sessions] == [True]


BARE_MACHINE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "onnx", "onnxruntime", "segmentation_models_pytorch", "cv2", "PIL", "rich"}:
            raise ImportError(name + " is not on this machine")

sys.meta_path.insert(0, Absent())
import numpy as np
import edgeseg
from edgeseg import backends
backends.BACKENDS["memory"] = "memory_backend"
with edgeseg.load(sys.argv[1]) as segmenter:
    for size in ((32, 48), (100, 100), (5, 7)):
        print(segmenter(np.full((*size, 3), 130, np.uint8)).shape, segmenter.palette.shape)
"""


def test_loading_and_calling_needs_numpy_alone(tmp_path: Path) -> None:
    write_memory_engine(tmp_path / "engine", make_spec(kind="logits"))
    result = subprocess.run(
        [sys.executable, "-c", BARE_MACHINE, str(tmp_path / "engine")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},  # where memory_backend is
    )
    assert result.stderr == ""
    assert result.stdout.splitlines() == ["(32, 48) (5, 3)", "(100, 100) (5, 3)", "(5, 7) (5, 3)"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_replaced_while_it_is_loaded_is_loaded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Manifest and engine are of one build, whichever, also when the new file does not go with the old manifest."""
    monkeypatch.setitem(backends.BACKENDS, "memory", "memory_backend")
    folder, first, second = tmp_path / "engine", make_spec(classes=3), make_spec(classes=5)
    write_memory_engine(folder, first)
    inner, loaded = MemoryBackend.load, list[PipelineSpec]()

    def load_slowly(self: MemoryBackend, engine: Engine) -> MemorySession:
        loaded.append(engine.manifest.spec)
        if len(loaded) == 1:
            with engine_folder(folder, force=True) as scratch:
                write_memory_engine(scratch, second)
            if fails:
                raise ArtifactError("the engine file is another's")
        return inner(self, engine)

    monkeypatch.setattr(MemoryBackend, "load", load_slowly)
    with load(folder) as segmenter:
        assert segmenter.spec == second
    assert loaded == [first, second]
