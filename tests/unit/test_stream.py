"""Reading, inference and consumer side by side: order, errors, ends of all kinds, and no thread left over."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_backend import MemorySession
from PIL import Image

from edgeseg.errors import InputError, MissingDependencyError, SpecError
from edgeseg.machine.cpu import Cpu
from edgeseg.runtime import overlap, sources
from edgeseg.runtime.overlap import Overlapped, in_parallel
from edgeseg.runtime.segmenter import Segmenter
from edgeseg.runtime.sources import Picture, camera_index
from edgeseg.runtime.stream import stream
from edgeseg.spec import InputSpec, ModelSpec, PipelineSpec

SPEC = PipelineSpec(ModelSpec("custom", classes=4), InputSpec(16, 16, stride=1))
PATIENCE_S = 30.0


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    def ours() -> set[threading.Thread]:
        return {t for t in threading.enumerate() if t.name.startswith("edgeseg-")}

    before = ours()
    yield
    if not ours() <= before:
        gc.collect()
    assert ours() <= before


def segmenter() -> Segmenter:
    return Segmenter(MemorySession(SPEC), SPEC)


def level(index: int) -> np.ndarray:
    return np.full((16, 16, 3), index % 256, np.uint8)


def test_frames_come_in_order_with_their_masks() -> None:
    frames = list(stream((level(i * 5) for i in range(50)), segmenter()))
    assert [frame.index for frame in frames] == list(range(50))
    for frame in frames:
        assert frame.timestamp_s is None
        assert frame.path is None
        np.testing.assert_array_equal(frame.image, level(frame.index * 5))
        np.testing.assert_array_equal(frame.mask, frame.image[..., 0] // 64)


def test_a_source_may_fill_one_buffer_again_and_again() -> None:
    buffer = np.empty((16, 16, 3), np.uint8)

    def filled() -> Iterator[np.ndarray]:
        for index in range(20):
            buffer[:] = level(index * 5)
            yield buffer

    for frame in stream(filled(), segmenter(), ahead=4):
        time.sleep(0.002)  # the source is ahead by then
        np.testing.assert_array_equal(frame.image, level(frame.index * 5))
        np.testing.assert_array_equal(frame.mask, frame.image[..., 0] // 64)


def test_a_folder_of_images_is_read_in_order(tmp_path: Path) -> None:
    for i in (1, 2, 10):
        Image.fromarray(level(i)).save(tmp_path / f"f{i}.png")
    frames = list(stream(tmp_path, segmenter()))
    assert [frame.path.name for frame in frames if frame.path] == ["f1.png", "f2.png", "f10.png"]
    assert [int(frame.image[0, 0, 0]) for frame in frames] == [1, 2, 10]
    assert [f.index for f in stream(str(tmp_path / "f1*.png"), segmenter())] == [0, 1]


def test_files_are_rgb_even_for_a_bgr_segmenter(tmp_path: Path) -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[..., 0] = 200
    Image.fromarray(image).save(tmp_path / "red.png")

    def red(images: np.ndarray) -> np.ndarray:
        return np.eye(4, dtype=np.float32)[images[..., 0] // 64].transpose(0, 3, 1, 2)

    bgr = Segmenter(MemorySession(SPEC, red), SPEC, channel_order="bgr")
    (frame,) = stream(tmp_path, bgr)
    np.testing.assert_array_equal(frame.image, image)
    assert frame.mask.tolist() == np.full((16, 16), 3).tolist()
    (frame,) = stream([image[..., ::-1]], bgr)
    assert frame.mask.min() == 3


def each(work: Callable[[int], int]) -> Callable[[Iterator[int]], Generator[int, None, None]]:
    return lambda items: (work(item) for item in items)


def test_all_three_work_at_the_same_time() -> None:
    """Each step waits until all three are busy at once: serial code would never get there."""
    together = threading.Barrier(3, timeout=PATIENCE_S)

    def items() -> Iterator[int]:
        yield 0
        yield 1
        together.wait()
        yield 2

    def work(item: int) -> int:
        if item == 1:
            together.wait()
        return item

    with Overlapped(items(), each(work)) as results:
        assert next(results) == 0
        together.wait()
        assert list(results) == [1, 2]


def test_reading_ahead_is_bounded() -> None:
    drawn = []

    def items() -> Iterator[int]:
        for i in range(1000):
            drawn.append(i)
            yield i

    with Overlapped(items(), each(lambda item: item), ahead=3) as results:
        next(results)
        time.sleep(0.2)
        # 1 taken, 3 waiting at each hand-over, and 1 in the hands of each thread.
        assert len(drawn) <= 1 + 3 + 3 + 2


def test_several_threads_work_at_the_same_time_and_the_order_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "this_cpu", lambda: Cpu("made up", "x86", (), 3))
    # Passed only by three threads at once.
    together = threading.Barrier(3, timeout=10)

    def work(item: int) -> int:
        together.wait()
        time.sleep(0.03 * (2 - item % 3))  # the first is done last
        return item

    assert list(in_parallel(range(9), work)) == list(range(9))


def test_working_in_parallel_draws_no_more_than_it_has_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "this_cpu", lambda: Cpu("made up", "x86", (), 64))
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for i in range(1000):
            drawn.append(i)
            yield i

    results = in_parallel(items(), lambda item: item)
    assert [next(results), next(results)] == [0, 1]
    assert len(drawn) == 1 + overlap.MAX_THREADS
    results.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("edgeseg-parallel")]


def test_a_slow_item_stops_the_other_threads_only_when_they_are_too_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "this_cpu", lambda: Cpu("made up", "x86", (), 2))
    third = threading.Event()

    def work(item: int) -> bool:
        if item == 3:
            third.set()
        return third.wait(0.5) if item == 0 else True

    assert list(in_parallel(range(9), work, ahead=2)) == [True] * 9
    third.clear()
    assert list(in_parallel(range(9), work)) == [False, *[True] * 8]


def test_an_error_in_parallel_work_comes_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "this_cpu", lambda: Cpu("made up", "x86", (), 2))
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 2:
            raise InputError("item 2")
        time.sleep(0.02)
        return item

    results = in_parallel(range(100), work)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(InputError, match="item 2"):
        next(results)
    assert max(begun) <= 3


def test_an_error_while_reading_comes_after_the_frames_before_it(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(level(i)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"broken")
    frames = stream(tmp_path, segmenter())
    assert [next(frames).index for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match=r"3\.png"):
        next(frames)
    with pytest.raises(StopIteration):
        next(frames)


def test_an_error_of_the_source_itself_reaches_the_consumer() -> None:
    def items() -> Iterator[np.ndarray]:
        yield level(0)
        raise ZeroDivisionError("the user's own")

    frames = stream(items(), segmenter())
    next(frames)
    with pytest.raises(ZeroDivisionError, match="the user's own"):
        next(frames)


def test_an_error_while_segmenting_reaches_the_consumer() -> None:
    frames = stream([level(0), np.zeros((16, 16, 3), np.float32), level(2)], segmenter())
    next(frames)
    with pytest.raises(InputError, match="float32"):
        next(frames)


def test_leaving_the_loop_ends_everything() -> None:
    closed = threading.Event()

    def forever() -> Iterator[np.ndarray]:
        try:
            for i in itertools.count():
                yield level(i)
        finally:
            closed.set()

    for frame in stream(forever(), segmenter()):
        if frame.index == 5:
            break
    gc.collect()
    assert closed.wait(PATIENCE_S)


def test_an_exception_in_the_loop_body_ends_everything() -> None:
    with pytest.raises(KeyError), stream((level(i) for i in itertools.count()), segmenter()) as frames:
        for _ in frames:
            raise KeyError("consumer")
    with pytest.raises(StopIteration):
        next(frames)


def test_closing_while_the_reader_waits_for_room_and_the_consumer_never_came() -> None:
    frames = stream((level(i) for i in itertools.count()), segmenter(), ahead=1)
    frames.close()
    frames.close()
    assert list(frames) == []
    used = stream((level(i) for i in itertools.count()), segmenter(), ahead=1)
    next(used)
    time.sleep(0.05)
    used.close()


def test_a_source_never_started_is_closed_too() -> None:
    class Source:
        closed = False

        def __iter__(self) -> Iterator[int]:
            return iter(())

        def close(self) -> None:
            self.closed = True

    source = Source()
    Overlapped(source, each(lambda item: item)).close()
    assert source.closed


def test_newest_frame_wins_and_the_dropped_are_counted() -> None:
    """The reader runs through all frames while the engine still holds the first: of the rest only the last is left."""
    started, all_read = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        assert started.wait(PATIENCE_S)
        yield from range(1, 100)
        all_read.set()

    def work(item: int) -> int:
        started.set()
        assert all_read.wait(PATIENCE_S)
        return item

    with Overlapped(items(), each(work), newest_wins=True) as results:
        assert list(results) == [0, 99]
        assert results.dropped == 98


def test_nothing_is_dropped_by_default() -> None:
    slow = MemorySession(SPEC, lambda images: time.sleep(0.002) or np.zeros((1, 4, 16, 16), np.float32))
    frames = stream((level(i) for i in range(40)), Segmenter(slow, SPEC))
    assert len(list(frames)) == 40
    assert frames.dropped == 0


def test_drop_can_be_asked_for() -> None:
    entered, go_on = threading.Event(), threading.Event()

    def items() -> Iterator[np.ndarray]:
        yield level(0)
        assert entered.wait(PATIENCE_S)
        for i in range(1, 30):
            yield level(i)
        go_on.set()

    def logits(images: np.ndarray) -> np.ndarray:
        entered.set()
        assert go_on.wait(PATIENCE_S)
        return np.zeros((1, 4, 16, 16), np.float32)

    frames = stream(items(), Segmenter(MemorySession(SPEC, logits), SPEC), drop=True)
    assert [frame.index for frame in frames] == [0, 29]
    assert frames.dropped == 28


INTERRUPTED = """
import itertools, sys, threading
import numpy as np
from memory_backend import MemorySession
from edgeseg.runtime.segmenter import Segmenter
from edgeseg.runtime.stream import stream
from edgeseg.spec import InputSpec, ModelSpec, PipelineSpec

spec = PipelineSpec(ModelSpec("custom", classes=4), InputSpec(16, 16, stride=1))
blocked = threading.Event()

def source():
    yield np.zeros((16, 16, 3), np.uint8)
    print("waiting", flush=True)
    blocked.wait(3)

try:
    for frame in stream(source(), Segmenter(MemorySession(spec), spec)):
        pass
except KeyboardInterrupt:
    print("interrupted", len([t for t in threading.enumerate() if t.name.startswith("edgeseg-")]), flush=True)
"""


def test_ctrl_c_while_waiting_for_a_frame() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},  # where memory_backend is
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert out == "interrupted 0\n", err


def test_what_cannot_be_streamed() -> None:
    with pytest.raises(InputError, match="no stream"):
        stream(level(0), segmenter())
    with pytest.raises(InputError, match="cannot stream from a float"):
        stream(0.5, segmenter())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not exist"):
        stream("missing", segmenter())
    with pytest.raises(InputError, match=r"rtsp://door/1 is a URL; open it with OpenCV"):
        stream("rtsp://door/1", segmenter())


@pytest.mark.parametrize("ahead", [0, "2", 1.5, True])
def test_ahead_is_a_number_of_frames(ahead: Any) -> None:
    with pytest.raises(SpecError, match="ahead is .*; give how many frames may wait, at least 1"):
        stream([], segmenter(), ahead=ahead)
    assert len(list(stream([level(0)] * 3, segmenter(), ahead=np.int64(2)))) == 3


def test_several_threads_may_take_frames_of_one_stream() -> None:
    frames = stream((level(k % 200) for k in range(60)), segmenter())
    taken: list[int] = []
    begin = threading.Barrier(4)

    def take() -> None:
        begin.wait()
        taken.extend(frame.index for frame in frames)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(take) for _ in range(4)]:
            future.result()
    assert sorted(taken) == list(range(60))


def test_which_sources_are_cameras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [camera_index(s) for s in (0, "0", "12", True, "a", "-1", "1.5", Path("0"), "²")] == [
        0, 0, 12, None, None, None, None, None, None,
    ]  # fmt: skip
    (tmp_path / "7").mkdir()
    assert camera_index("7") is None
    assert camera_index("9" * 5000) is None  # Python makes no number of so many digits, a file may be named so
    for number in (-1, 10**5, 10**5000):
        with pytest.raises(InputError, match="^there is no camera .*give 0 to 9999"):
            camera_index(number)
    monkeypatch.setattr("os.path.realpath", lambda path: "/dev/video3" if "v4l" in str(path) else str(path))
    links = (
        "/dev/video12",
        Path("/dev/video0"),
        "/dev/v4l/by-id/usb-camera",
        "/dev/null",
        "/dev/videos",
        "/dev/video0.png",
    )
    assert [camera_index(link) for link in links] == [12, 0, 3, None, None, None]


# Videos and cameras


def make_video(path: Path, frames: int, size: tuple[int, int] = (32, 48)) -> Path:
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, size[::-1])
    for i in range(frames):
        frame = np.zeros((*size, 3), np.uint8)
        frame[..., 2] = i * 20  # red, in OpenCV's order
        writer.write(frame)
    writer.release()
    return path


def test_video_frames_are_rgb_with_times(tmp_path: Path) -> None:
    frames = list(stream(make_video(tmp_path / "a.avi", 8), segmenter()))
    assert [frame.index for frame in frames] == list(range(8))
    np.testing.assert_allclose([f.timestamp_s for f in frames], np.arange(8) / 10, atol=1e-3)
    for i, frame in enumerate(frames):
        assert frame.image.shape == (32, 48, 3)
        assert frame.mask.shape == (32, 48)
        assert np.abs(frame.image.astype(int) - (i * 20, 0, 0)).max() < 12


def test_grey_models_get_grey_video(tmp_path: Path) -> None:
    from edgeseg.spec import Preprocess

    spec = PipelineSpec(
        ModelSpec("custom", classes=4, in_channels=1), InputSpec(16, 16, 1, stride=1), Preprocess((0.5,), (0.5,))
    )
    (first, *_) = stream(make_video(tmp_path / "a.avi", 2), Segmenter(MemorySession(spec), spec))
    assert first.image.shape == (32, 48, 1)


def test_opencv_adds_nothing_to_our_error(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    (tmp_path / "bad.mp4").write_bytes(b"this is no video")
    code = (
        "import sys, edgeseg, pathlib\nfrom edgeseg.runtime.sources import Video\n"
        "for source in (pathlib.Path(sys.argv[1]), 63):\n"
        "    try: Video(source)\n    except edgeseg.InputError as exc: print(exc)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "bad.mp4")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) == 2


def test_a_camera_that_is_not_there() -> None:
    pytest.importorskip("cv2")
    with pytest.raises(InputError, match="cannot open camera 63"):
        stream(63, segmenter())


def test_videos_need_opencv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingDependencyError, match=r"edgeseg\[video\]"):
        stream(tmp_path / "a.mp4", segmenter())


class FakeCapture:
    """A camera that delivers 30 frames as fast as they are taken."""

    def __init__(self, source: int) -> None:
        self.left, self.released = 30, False

    def isOpened(self) -> bool:  # noqa: N802
        return True

    def get(self, what: int) -> float:
        return -1.0

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.left -= 1
        return (self.left >= 0), np.zeros((16, 16, 3), np.uint8) + self.left if self.left >= 0 else None

    def release(self) -> None:
        self.released = True


def test_cameras_drop_by_default_and_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = pytest.importorskip("cv2")
    captures = []
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: captures.append(FakeCapture(source)) or captures[-1])
    with stream("0", segmenter()) as frames:
        seen = list(frames)
    assert len(seen) + frames.dropped == 30
    assert [f.index for f in seen] == sorted({f.index for f in seen})
    assert seen[-1].index == 29
    times = [frame.timestamp_s for frame in seen]
    assert None not in times
    assert times == sorted(times)
    assert 0.0 <= times[0] < PATIENCE_S
    assert captures[0].released
    assert isinstance(sources.Video(0), sources.Video)
    assert Picture(0, None, level(0)).channel_order is None


def test_source_and_segmenter_may_change_places(tmp_path: Path) -> None:
    paths = []
    for index in range(3):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(level(index)).save(paths[-1])
    engine = segmenter()
    for frames in (stream(engine, tmp_path), stream(tmp_path, engine), stream(paths, engine), stream(engine, paths)):
        assert [(frame.index, frame.path) for frame in frames] == list(enumerate(paths))
    with pytest.raises(
        SpecError, match=r"segmenter is 'engines.*'; give a source of images and what edgeseg.load returns"
    ):
        stream(tmp_path, "engines/x")
