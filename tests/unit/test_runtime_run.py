"""What ``edgeseg run`` writes, under which names, and what it does when inputs or the disk are bad."""

from __future__ import annotations

import io
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_backend import MemorySession
from PIL import Image

from edgeseg.cli.output import print_json
from edgeseg.errors import ArtifactError, BuildError, InputError, OutputExistsError, SpecError
from edgeseg.machine.cpu import Cpu
from edgeseg.runtime import overlap, run, sources
from edgeseg.runtime.outputs import VideoFile, unique_names, write_mask, write_picture
from edgeseg.runtime.overlay import class_palette, colorize
from edgeseg.runtime.run import RunSettings, run_inputs
from edgeseg.runtime.segmenter import Segmenter
from edgeseg.spec import InputSpec, ModelSpec, PipelineSpec

RNG = np.random.default_rng(9)
NAMES = ("sky", "road/lane", "car", "tree")
SPEC = PipelineSpec(ModelSpec("custom", classes=4, class_names=NAMES), InputSpec(16, 16, stride=1, fit="tile"))


def segmenter(spec: PipelineSpec = SPEC) -> Segmenter:
    return Segmenter(MemorySession(spec), spec)


def photo(path: Path, size: tuple[int, int] = (20, 30)) -> np.ndarray:
    image = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(image).save(path)
    return image


def expected_mask(image: np.ndarray, classes: int = 4) -> np.ndarray:
    return image.astype(np.int64).sum(axis=2) * classes // 768


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_masks_are_palette_pngs_of_class_indices(tmp_path: Path) -> None:
    image = photo(tmp_path / "in" / "a.png")
    summary = run_inputs(segmenter(), [tmp_path / "in"], tmp_path / "out", progress=False)
    assert files(tmp_path / "out") == ["masks/a.png"]
    assert summary.written == (str(tmp_path / "out/masks/a.png"),)
    assert (summary.images, summary.frames, summary.failed) == (1, 0, ())
    assert summary.seconds > 0
    assert summary.frames_per_second == pytest.approx(1 / summary.seconds)
    with Image.open(tmp_path / "out/masks/a.png") as png:
        assert png.mode == "P"
        np.testing.assert_array_equal(np.asarray(png), expected_mask(image))
        np.testing.assert_array_equal(np.asarray(png.convert("RGB")), class_palette(4)[expected_mask(image)])


def test_a_mask_of_areas_is_smaller_than_with_the_usual_compression(tmp_path: Path) -> None:
    y, x = np.mgrid[:300, :400]
    mask = ((np.hypot(y - 150, x - 90) < 80) + 2 * (np.hypot(y - 80, x - 300) < 110 + 9 * np.sin(y / 7))).astype(
        np.uint8
    )
    write_mask(tmp_path / "mask.png", mask, class_palette(30))
    usual = io.BytesIO()
    with Image.open(tmp_path / "mask.png") as picture:
        assert np.array_equal(np.asarray(picture), mask)
        picture.save(usual, "PNG")
    assert (tmp_path / "mask.png").stat().st_size < usual.tell()


def test_overlays_have_the_image_and_a_legend(tmp_path: Path) -> None:
    image = photo(tmp_path / "a.jpg", (40, 60))
    with Image.open(tmp_path / "a.jpg") as stored:
        image = np.asarray(stored.convert("RGB"))
    run_inputs(
        segmenter(), [str(tmp_path / "a.jpg")], tmp_path / "out", RunSettings(overlay=True, alpha=0.25), progress=False
    )
    assert files(tmp_path / "out") == ["masks/a.png", "overlays/a.png"]
    with Image.open(tmp_path / "out/overlays/a.png") as png:
        picture = np.asarray(png)
    blend = image * 0.75 + colorize(expected_mask(image)) * 0.25
    assert np.abs(picture[:40, :60] - blend).max() <= 1
    assert picture.shape[1] > 60


def test_more_than_256_classes_are_16_bit(tmp_path: Path) -> None:
    spec = PipelineSpec(ModelSpec("custom", classes=400), InputSpec(16, 16, stride=1, fit="tile"))
    image = photo(tmp_path / "a.png")
    run_inputs(segmenter(spec), [tmp_path / "a.png"], tmp_path / "out", RunSettings(overlay=True), progress=False)
    with Image.open(tmp_path / "out/masks/a.png") as png:
        assert png.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(png), expected_mask(image, 400))


def test_multilabel_is_a_file_per_class(tmp_path: Path) -> None:
    model = ModelSpec("custom", classes=4, class_names=NAMES, task="multilabel")
    spec = PipelineSpec(model, InputSpec(16, 16, stride=1, fit="tile"))
    photo(tmp_path / "a.png")
    summary = run_inputs(
        segmenter(spec), [tmp_path / "a.png"], tmp_path / "out", RunSettings(overlay=True), progress=False
    )
    assert files(tmp_path / "out") == [
        "masks/a.0-sky.png", "masks/a.1-road_lane.png", "masks/a.2-car.png", "masks/a.3-tree.png", "overlays/a.png",
    ]  # fmt: skip
    assert len(summary.written) == 5
    with Image.open(tmp_path / "a.png") as source, Image.open(tmp_path / "out/masks/a.2-car.png") as png:
        planes = segmenter(spec)(np.asarray(source))
        np.testing.assert_array_equal(np.asarray(png), planes[2])
        assert png.convert("RGB").getcolors() is not None


def test_bad_images_are_named_and_the_rest_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in (1, 3):
        photo(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"broken")
    (tmp_path / "4.png").write_bytes(b"")
    summary = run_inputs(segmenter(), [tmp_path], tmp_path / "out")
    assert files(tmp_path / "out") == ["masks/1.png", "masks/3.png"]
    assert summary.images == 2
    assert [failure.input for failure in summary.failed] == [str(tmp_path / "2.png"), str(tmp_path / "4.png")]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.startswith("skipped: ") for line in captured.err.splitlines()] == [True, True], captured.err


@pytest.mark.parametrize(("limit", "end"), [(None, "5/5"), (2, "3/3"), (3, "4/4"), (9, "5/5")])
def test_the_bar_ends_at_its_total(
    limit: int | None, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of five images is broken and does not count towards the limit."""
    monkeypatch.setattr("edgeseg.runtime.bar.draws_bars", lambda console: True)
    for i in (1, 3, 4, 5):
        photo(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"broken")
    run_inputs(segmenter(), [tmp_path], tmp_path / "out", limit=limit)
    assert capsys.readouterr().err.count(end) == 1


@pytest.mark.parametrize("no_color", [False, True])
def test_on_a_terminal_no_color_holds(no_color: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        photo(tmp_path / f"{i}.png")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        run_inputs(segmenter(), [tmp_path], tmp_path / "out", limit=2)
        # A read of a terminal returns 4 KiB at most.
        shown = b""
        while select.select([master], [], [], 0)[0]:
            shown += os.read(master, 4096)
    os.close(master)
    assert b"2/2" in shown
    assert bool(re.search(rb"\x1b\[[0-9;]+m", shown)) == (not no_color), shown


OVERLAY_PEAK = """
import dataclasses, resource, sys
sys.path[:0] = [{tests!r}, {unit!r}]
from pathlib import Path
from test_runtime_run import SPEC, InputSpec, RunSettings, run_inputs, segmenter
resizing = segmenter(dataclasses.replace(SPEC, input=InputSpec(16, 16, stride=1)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run_inputs(resizing, [Path("big.png")], Path("out"), RunSettings(overlay=True), progress=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_an_overlay_takes_a_few_bytes_a_pixel(tmp_path: Path) -> None:
    side = 4000
    Image.new("RGB", (side, side), (90, 120, 200)).save(tmp_path / "big.png", compress_level=1)
    unit = Path(__file__).parent
    code = OVERLAY_PEAK.format(tests=str(unit.parent), unit=str(unit))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    # 170 megapixels in 4 GB are 23 bytes each.
    assert int(done.stdout) < 20 * side * side


def test_odd_names_stop_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    longest = {f"{letter * 249}.{suffix}" for letter in "ab" for suffix in ("png", "bmp")} | {"ü" * 125 + ".png"}
    undecodable = os.fsdecode(b"bad\xff.png")
    for name in (*longest, undecodable, "new\nline.png", "z.png"):
        photo(folder / name)
    (folder / "0.png").symlink_to(folder / "gone.png")
    os.mkfifo(folder / "1.png")
    (folder / os.fsdecode(b"2\xff.mp4")).write_bytes(b"OpenCV crashes when given this name")
    summary = run_inputs(segmenter(), [folder], tmp_path / "out", RunSettings(overlay=True), progress=False)
    assert summary.images == 8
    assert len(set(summary.written)) == len(files(tmp_path / "out")) == 16
    assert max(len(os.fsencode(Path(name).name)) for name in summary.written) < 200
    reasons = [failure.reason for failure in summary.failed]
    assert [Path(failure.input).name for failure in summary.failed] == ["0.png", "1.png", os.fsdecode(b"2\xff.mp4")]
    for reason, words in zip(
        reasons, ("a link to .*gone.png", "no regular file", "needs a name in UTF-8"), strict=True
    ):
        assert re.search(words, reason)
    print_json(summary)
    assert json.loads(capsys.readouterr().out)["written"] == list(summary.written)
    planes = make_planes(tmp_path, "ü" * 300)
    assert planes == ["masks/z.0-" + "ü" * 20 + ".png"]


def make_planes(tmp_path: Path, class_name: str) -> list[str]:
    spec = PipelineSpec(
        ModelSpec("custom", classes=1, task="multilabel", class_names=(class_name,)), InputSpec(16, 16, stride=1)
    )
    run_inputs(segmenter(spec), [tmp_path / "in" / "z.png"], tmp_path / "planes", progress=False)
    return files(tmp_path / "planes")


def test_a_broken_engine_is_not_a_bad_image(tmp_path: Path) -> None:
    def broken(images: np.ndarray) -> np.ndarray:
        raise BuildError("the engine failed")

    photo(tmp_path / "a.png")
    with pytest.raises(BuildError):
        run_inputs(Segmenter(MemorySession(SPEC, broken), SPEC), [tmp_path / "a.png"], tmp_path / "out", progress=False)
    assert files(tmp_path / "out") == [] if (tmp_path / "out").exists() else True


def test_inputs_that_share_a_stem_get_names_of_their_own(tmp_path: Path) -> None:
    photos = {name: photo(tmp_path / name) for name in ("left/a.png", "right/a.png", "b.png", "b.bmp", "c.png")}
    inputs = [tmp_path / name for name in photos]
    run_inputs(segmenter(), [*inputs, inputs[0], str(tmp_path / "left")], tmp_path / "out", progress=False)
    names = {"left/a.png": "left_a", "right/a.png": "right_a", "b.png": "b_png", "b.bmp": "b_bmp", "c.png": "c"}
    assert files(tmp_path / "out") == sorted(f"masks/{name}.png" for name in names.values())
    for source, name in names.items():
        with Image.open(tmp_path / "out/masks" / f"{name}.png") as png:
            np.testing.assert_array_equal(np.asarray(png), expected_mask(photos[source]))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.builds(
            lambda folders, stem, suffix: Path("/", *folders, stem + suffix),
            st.lists(st.sampled_from("xyX"), max_size=3),
            st.sampled_from(["a", "A", "b", "a_png", "x_a", "a-2"]),
            st.sampled_from([".png", ".jpg", ".PNG"]),
        ),
        max_size=12,
    )
)
def test_names_are_never_alike(paths: list[Path]) -> None:
    names = unique_names(paths)
    assert len(names) == len(paths)
    assert len({name.casefold() for name in names}) == len(paths)
    for path, name in zip(paths, names, strict=True):
        assert path.stem in name
        assert "/" not in name


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png")
    (tmp_path / "out/masks").mkdir(parents=True)
    (tmp_path / "out/masks/b.png").write_text("mine")
    inputs = [tmp_path / "a.png", tmp_path / "b.png"]
    with pytest.raises(OutputExistsError, match=r"b\.png exists; give --force"):
        run_inputs(segmenter(), inputs, tmp_path / "out", progress=False)
    assert files(tmp_path / "out") == ["masks/b.png"]
    assert (tmp_path / "out/masks/b.png").read_text() == "mine"
    run_inputs(segmenter(), inputs, tmp_path / "out", overwrite=True, progress=False)
    with Image.open(tmp_path / "out/masks/b.png") as png:
        assert png.size == (30, 20)


def test_an_input_is_never_an_output(tmp_path: Path) -> None:
    photo(tmp_path / "masks" / "a.png")
    before = (tmp_path / "masks" / "a.png").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(SpecError, match="would replace the input"):
            run_inputs(segmenter(), [tmp_path / "masks"], tmp_path, overwrite=overwrite, progress=False)
    assert (tmp_path / "masks" / "a.png").read_bytes() == before


def test_a_video_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    path = tmp_path / "a.mp4"
    with pytest.raises(OutputExistsError, match="exists"), VideoFile(path, 10.0) as video:
        video.write(np.zeros((16, 16, 3), np.uint8))
        path.write_text("theirs")
    assert files(tmp_path) == ["a.mp4"]
    assert path.read_text() == "theirs"


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(part: Path, data: bytes) -> None:
        with part.open("wb") as stream:
            stream.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    for write in (lambda p: write_mask(p, np.zeros((2, 2), np.uint8), class_palette(2)),
                  lambda p: write_picture(p, np.zeros((2, 2, 3), np.uint8))):  # fmt: skip
        with pytest.raises(InputError, match=r"cannot write .*a\.png: No space left on device"):
            write(tmp_path / "a.png")
    assert files(tmp_path) == []


def test_an_output_folder_that_cannot_be_made(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ArtifactError, match=r"cannot write .*a\.png: .*out is a file; give another file"):
        run_inputs(segmenter(), [tmp_path / "a.png"], tmp_path / "out", progress=False)


def test_images_that_fail_do_not_count_towards_the_limit(tmp_path: Path) -> None:
    for i in range(8):
        photo(tmp_path / "in" / f"{i}.png")
    for i in (0, 2, 3):
        (tmp_path / "in" / f"{i}.png").write_bytes(b"no picture")
    summary = run_inputs(segmenter(), [tmp_path / "in"], tmp_path / "out", limit=3, progress=False)
    assert (summary.images, len(summary.failed)) == (3, 3)
    assert files(tmp_path / "out") == [f"masks/{i}.png" for i in (1, 4, 5)]


def test_several_images_at_a_time_give_the_files_and_the_order_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = {f"{i:02d}": photo(tmp_path / "in" / f"{i:02d}.png", (20 + i % 7 * 30, 30)) for i in range(20)}
    monkeypatch.setattr(overlap, "this_cpu", lambda: Cpu("made up", "x86", (), 4))
    # The larger ones take turns.
    monkeypatch.setattr(run, "LARGE_BYTES", 100 * 30 * 3)
    summary = run_inputs(segmenter(), [tmp_path / "in"], tmp_path / "out", RunSettings(overlay=True), progress=False)
    assert [Path(path).stem for path in summary.written if "masks" in path] == list(images)
    assert len(summary.written) == 40
    for name, image in images.items():
        mask = np.asarray(Image.open(tmp_path / "out" / "masks" / f"{name}.png"))
        assert np.array_equal(mask, expected_mask(image))


def test_a_run_calls_from_several_threads_for_images_and_from_one_for_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(6):
        photo(tmp_path / "in" / f"{i}.png")
    monkeypatch.setattr(overlap, "this_cpu", lambda: Cpu("made up", "x86", (), 3))
    assert run.streams_of([tmp_path / "in"], RunSettings()) == 3
    assert run.streams_of([tmp_path / "in" / "0.png"], RunSettings()) == 1
    assert run.streams_of([tmp_path / "in", 0], RunSettings()) == 1
    monkeypatch.setattr(overlap, "this_cpu", lambda: Cpu("made up", "x86", (), 64))
    assert run.streams_of([tmp_path / "in"], RunSettings()) == overlap.MAX_THREADS
    assert run.streams_of([tmp_path / "in"], RunSettings(threads=2)) == 2


@pytest.mark.parametrize(("threads", "together"), [(1, 1), (3, 3), (None, 4)])
def test_no_more_images_at_a_time_than_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int | None, together: int
) -> None:
    """As many as may be at a time wait for each other: were there fewer, the barrier would break."""
    for i in range(12):
        photo(tmp_path / "in" / f"{i}.png")
    monkeypatch.setattr(overlap, "this_cpu", lambda: Cpu("made up", "x86", (), 8))
    meeting, most, inside = threading.Barrier(together, timeout=60), 0, 0
    answer = Segmenter.__call__

    def call(self: Segmenter, *given: Any, **options: Any) -> Any:
        nonlocal most, inside
        inside += 1
        most = max(most, inside)
        meeting.wait()
        inside -= 1
        return answer(self, *given, **options)

    monkeypatch.setattr(Segmenter, "__call__", call)
    settings = RunSettings(threads=threads)
    assert run_inputs(segmenter(), [tmp_path / "in"], tmp_path / "out", settings, progress=False).images == 12
    assert most == together


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    for inputs in ([], ["missing.png"], [tmp_path], [str(tmp_path / "*.png")]):
        with pytest.raises(InputError):
            run_inputs(segmenter(), inputs, tmp_path / "out", progress=False)
    with pytest.raises(SpecError, match="alpha is 2.0; give an opacity from 0 to 1"):
        RunSettings(alpha=2.0)
    assert not (tmp_path / "out").exists()


# Videos


def make_video(path: Path, frames: int = 6, size: tuple[int, int] = (33, 47)) -> Path:
    cv2 = pytest.importorskip("cv2")
    path.parent.mkdir(exist_ok=True, parents=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, size[::-1])
    for i in range(frames):
        writer.write(np.full((*size, 3), 20 + i * 40, np.uint8))
    writer.release()
    return path


def read_video(path: Path) -> tuple[list[np.ndarray], float]:
    import cv2

    capture = cv2.VideoCapture(str(path))
    frames = []
    while True:
        is_there, frame = capture.read()
        if not is_there:
            break
        frames.append(frame[..., ::-1])
    fps = capture.get(cv2.CAP_PROP_FPS)
    capture.release()
    return frames, fps


@pytest.mark.parametrize("overlay", [True, False])
def test_a_video_becomes_a_video(tmp_path: Path, overlay: bool) -> None:
    video = make_video(tmp_path / "drive.avi")
    summary = run_inputs(
        segmenter(), [video], tmp_path / "out", RunSettings(overlay=overlay), frame_masks=True, progress=False
    )
    assert (summary.images, summary.frames, summary.failed) == (0, 6, ())
    assert files(tmp_path / "out") == [*(f"masks/drive/{i:06d}.png" for i in range(6)), "videos/drive.mp4"]
    frames, fps = read_video(tmp_path / "out/videos/drive.mp4")
    assert fps == pytest.approx(10.0)
    assert len(frames) == 6
    assert {frame.shape[0] % 2 + frame.shape[1] % 2 for frame in frames} == {0}
    palette = class_palette(4)
    for i, frame in enumerate(frames):
        grey = 20 + i * 40
        colour = palette[grey * 4 // 256].astype(float)
        wanted = colour / 2 + grey / 2 if overlay else colour
        # mp4 stores colours coarsely: look at the middle of the plain area.
        assert np.abs(frame[8:24, 8:40].mean(axis=(0, 1)) - wanted).max() < 12
        with Image.open(tmp_path / f"out/masks/drive/{i:06d}.png") as png:
            assert np.unique(np.asarray(png)).tolist() == [grey * 4 // 256]


def test_images_and_videos_together_and_a_broken_video(tmp_path: Path) -> None:
    make_video(tmp_path / "in/b.avi", 3)
    photo(tmp_path / "in/a.png")
    photo(tmp_path / "in/c.png")
    (tmp_path / "in/broken.mp4").write_bytes(b"this is no video")
    summary = run_inputs(segmenter(), [tmp_path / "in"], tmp_path / "out", progress=False)
    assert files(tmp_path / "out") == ["masks/a.png", "masks/c.png", "videos/b.mp4"]
    assert (summary.images, summary.frames) == (2, 3)
    assert [failure.input for failure in summary.failed] == [str(tmp_path / "in/broken.mp4")]


def test_frames_lost_in_a_damaged_video_are_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with VideoFile(tmp_path / "in/whole.mp4", 10.0) as file:
        for _ in range(8):
            file.write(RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    content = bytearray((tmp_path / "in/whole.mp4").read_bytes())
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    last_quarter = (end - start) // 4
    content[end - last_quarter : end] = bytes(last_quarter)
    (tmp_path / "in/damaged.mp4").write_bytes(content)
    summary = run_inputs(segmenter(), [tmp_path / "in"], tmp_path / "out", progress=False)
    ((name, reason),) = ((failure.input, failure.reason) for failure in summary.failed)
    assert name == str(tmp_path / "in/damaged.mp4")
    decoded = len(read_video(tmp_path / "out/videos/damaged.mp4")[0])
    assert reason == f"{name}: {decoded} of 8 frames could be decoded"
    assert (summary.frames, 0 < decoded < 8) == (8 + decoded, True)
    assert (
        run_inputs(segmenter(), [tmp_path / "in/damaged.mp4"], tmp_path / "few", limit=1, progress=False).failed == ()
    )


def cut(content: bytes) -> bytes:
    return content[: len(content) * 6 // 10]


def overwritten(content: bytes) -> bytes:
    start, length = len(content) // 2, len(content) // 10
    return content[:start] + bytes(length) + content[start + length :]


def counted_wrong(content: bytes) -> bytes:
    """40 frames instead of 20, in the streams' header of an AVI file or the table of times of an MP4 file."""
    place, order = (
        (content.find(b"strh") + 40, "little") if content[:4] == b"RIFF" else (content.find(b"stts") + 12, "big")
    )
    assert int.from_bytes(content[place : place + 4], order) == 20  # type: ignore[arg-type]
    return content[:place] + (40).to_bytes(4, order) + content[place + 4 :]  # type: ignore[arg-type]


def inside_a_frame(content: bytes) -> bytes:
    """Nothing but zeros in the last block of a Matroska file; its head stays."""
    blocks = [match.end() for match in re.finditer(rb"\xa3[\x10-\x7f].\x81..[\x00\x80]", content, re.DOTALL)]
    return content[: blocks[-1]] + bytes(40) + content[blocks[-1] + 40 :]


@pytest.mark.parametrize(
    ("codec", "suffix", "damage", "told"),
    [
        ("mp4v", ".mp4", cut, "cannot open .*: not a video, damaged"),
        ("mp4v", ".mp4", overwritten, r": 1?\d of 20 frames could be decoded"),
        ("mp4v", ".mov", counted_wrong, ": 20 of 40 frames could be decoded"),
        ("MJPG", ".avi", cut, r": 1?\d of 20 frames could be decoded"),
        ("MJPG", ".avi", overwritten, r": 1?\d of 20 frames could be decoded"),
        ("MJPG", ".avi", counted_wrong, ": 20 of 40 frames could be decoded"),
        ("mp4v", ".mkv", cut, r": 1?\d frames could be decoded, \d+ bytes are missing at the end of the file"),
        ("VP80", ".webm", cut, r": 1?\d frames could be decoded, \d+ bytes are missing at the end of the file"),
        ("mp4v", ".mkv", overwritten, r": 1?\d frames could be decoded, the file is damaged at byte \d+"),
        ("VP90", ".webm", overwritten, r": 1?\d frames could be decoded, the file is damaged at byte \d+"),
        ("VP90", ".webm", inside_a_frame, r": 1?\d of 20 frames could be decoded"),
        ("mp4v", ".mkv", inside_a_frame, r": 1?\d of 20 frames could be decoded"),
    ],
)
def test_every_damage_that_a_container_shows_is_told(
    codec: str,
    suffix: str,
    damage: Callable[[bytes], bytes],
    told: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    cv2 = pytest.importorskip("cv2")
    whole, damaged = tmp_path / f"whole{suffix}", tmp_path / f"damaged{suffix}"
    writer = cv2.VideoWriter(str(whole), cv2.VideoWriter.fourcc(*codec), 10.0, (64, 48))
    for _ in range(20):
        writer.write(RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    writer.release()
    damaged.write_bytes(damage(whole.read_bytes()))
    summary = run_inputs(segmenter(), [whole, damaged], tmp_path / "out", progress=False)
    ((name, reason),) = ((failure.input, failure.reason) for failure in summary.failed)
    assert name == str(damaged)
    assert re.search(told, reason), reason


def test_nothing_of_a_damaged_video_reaches_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """OpenCV's own reader of AVI files prints what it found in place of a name."""
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "a.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (64, 48))
    writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    path.write_bytes(path.read_bytes().replace(b"LIST", b"\x1b[2J", 1))
    summary = run_inputs(segmenter(), [path], tmp_path / "out", progress=False)
    assert [failure.reason for failure in summary.failed] == [
        f"cannot open {path}: not a video, damaged, or of an unknown codec"
    ]
    assert capfd.readouterr() == ("", "")


def test_a_live_recording_of_unknown_length_is_whole(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(str(tmp_path / "a.mkv"), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (64, 48))
    for _ in range(5):
        writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    content = (tmp_path / "a.mkv").read_bytes()
    segment = content.index(b"\x18\x53\x80\x67") + 4
    unknown = b"\x01" + b"\xff" * 7
    assert content[segment] == 1  # eight bytes of size
    (tmp_path / "a.mkv").write_bytes(content[:segment] + unknown + content[segment + 8 :])
    summary = run_inputs(segmenter(), [tmp_path / "a.mkv"], tmp_path / "out", progress=False)
    assert (summary.frames, summary.failed) == (5, ())


def test_an_exception_in_a_video_leaves_no_file(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    with pytest.raises(ZeroDivisionError), VideoFile(tmp_path / "a.mp4", 10.0) as video:
        video.write(np.zeros((16, 16, 3), np.uint8))
        raise ZeroDivisionError
    assert files(tmp_path) == []
    (tmp_path / "a.mp4").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists"):
        VideoFile(tmp_path / "a.mp4", 10.0)


class FakeCamera:
    """A camera that takes a picture every eighth of a second by its own clock, when the engine has seen the last."""

    def __init__(self, seen: list[tuple[int, ...]]) -> None:
        self.seconds = 0.0
        self.seen = seen

    def isOpened(self) -> bool:  # noqa: N802
        return True

    def get(self, what: int) -> float:
        return 0.0

    def read(self) -> tuple[bool, np.ndarray]:
        while len(self.seen) < min(self.seconds / 0.125, 6):
            time.sleep(0.001)
        self.seconds += 0.125
        return True, np.full((16, 16, 3), 100, np.uint8)

    def release(self) -> None:
        pass


def test_ctrl_c_ends_a_camera_well_and_its_video_runs_at_the_speed_of_the_scene(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is raised where an error of the engine would be: as an exception out of waiting for the next frame."""
    cv2 = pytest.importorskip("cv2")
    calls = []

    def interrupted_after_five(images: np.ndarray) -> np.ndarray:
        calls.append(images.shape)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return np.zeros((1, 4, 16, 16), np.float32)

    camera = FakeCamera(calls)
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: camera)
    monkeypatch.setattr(sources, "time", SimpleNamespace(monotonic=lambda: camera.seconds))
    engine = Segmenter(MemorySession(SPEC, interrupted_after_five), SPEC)
    summary = run_inputs(engine, ["0"], tmp_path / "out", frame_masks=True, progress=False)
    assert summary.interrupted
    assert summary.frames == 5
    assert files(tmp_path / "out") == [*(f"masks/camera0/{i:06d}.png" for i in range(5)), "videos/camera0.mp4"]
    monkeypatch.undo()
    # 25 frames per second where the camera does not say: the fifth picture, taken at 0.5 s, is frame 12 of 13.
    assert len(read_video(tmp_path / "out/videos/camera0.mp4")[0]) == 13


def test_ctrl_c_in_a_video_file_leaves_nothing_half(tmp_path: Path) -> None:
    video = make_video(tmp_path / "drive.avi")

    def interrupted(images: np.ndarray) -> np.ndarray:
        if images.max() > 100:
            raise KeyboardInterrupt
        return np.zeros((1, 4, 16, 16), np.float32)

    with pytest.raises(KeyboardInterrupt):
        run_inputs(Segmenter(MemorySession(SPEC, interrupted), SPEC), [video], tmp_path / "out", progress=False)
    assert files(tmp_path / "out") == []
