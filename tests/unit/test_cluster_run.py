"""A run on a cluster is a run on one machine, with workers that die and a command that is killed: here without Ray."""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from cpu_folders import folder_for, own_scheme
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_backend import write_memory_engine
from PIL import Image

import edgeseg
from edgeseg.backends import BACKENDS
from edgeseg.backends.cpu.options import with_threads
from edgeseg.cli.app import cli
from edgeseg.cluster import ledger as ledgers
from edgeseg.cluster.connection import kept_stdout
from edgeseg.cluster.plan import Plan, sort_key
from edgeseg.cluster.pool import Batch, Event, Finished, Lost, Pool, shares
from edgeseg.cluster.run import engine_content, run_on_cluster
from edgeseg.cluster.worker import Item, Job, Outcome, Worker
from edgeseg.errors import (
    ArtifactError,
    BuildError,
    DeviceError,
    EdgesegError,
    InputError,
    MissingDependencyError,
    OutputExistsError,
    SpecError,
    StaleEngineError,
)
from edgeseg.images.decoding import list_images, natural_key
from edgeseg.runtime.outputs import unique_names
from edgeseg.runtime.raster import RasterOptions
from edgeseg.runtime.run import RunSettings, RunSummary, run_inputs
from edgeseg.silence import without_warnings
from edgeseg.spec import InputSpec, ModelSpec, OutputSpec, PipelineSpec
from edgeseg.store.engine import Engine, open_engine

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed: pip install 'edgeseg[cluster]'")

SPEC = PipelineSpec(ModelSpec("custom", classes=4), InputSpec(16, 16, stride=1, fit="tile"))
USUAL = RunSettings()
RNG = np.random.default_rng(3)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(BACKENDS, "memory", "memory_backend")
    monkeypatch.setenv("EDGESEG_CACHE", str(tmp_path / "cache"))
    write_memory_engine(tmp_path / "engine", SPEC)
    return tmp_path / "engine"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The store behind ``memory://``, which is empty."""
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    MemoryFileSystem.clear_instance_cache()
    return MemoryFileSystem()


class HerePool:
    """One worker, in this process: what happens to a batch is for ``fate`` to say."""

    workers = 1

    def __init__(self, job: Job, engines: Sequence[Engine], fate: Callable[[Batch], str | None]) -> None:
        self._worker = Worker(job, lambda number: engine_content(engines[number]))
        self._fate = fate
        self._given: list[Batch] = []
        self.batches: list[Batch] = []

    def has_room(self, batch: Batch) -> bool:
        return not self._given

    def give(self, batch: Batch) -> None:
        self._given.append(batch)
        self.batches.append(batch)

    def wait(self) -> list[Event]:
        batch = self._given.pop()
        fate = self._fate(batch)
        if fate == "dies":
            # Half of it is done when the worker dies.
            self._worker.segment(batch.items[: len(batch.items) // 2], overwrite=batch.overwrite)
            return [Lost(batch, "killed")]
        return [Finished(batch, self._worker.segment(batch.items, overwrite=batch.overwrite), 0.1)]


def on_cluster(
    engine: Path,
    inputs: Sequence[str | Path],
    output: str | Path,
    settings: RunSettings = USUAL,
    *,
    fate: Callable[[Batch], str | None] = lambda batch: None,
    batches: list[Batch] | None = None,
    **options: Any,
) -> RunSummary:
    @contextmanager
    def pool(job: Job, engines: Sequence[Engine], bar: object) -> Iterator[Pool]:
        here = HerePool(job, engines, fate)
        yield here
        if batches is not None:
            batches.extend(here.batches)

    return run_on_cluster(engine, inputs, output, settings, pool=pool, progress=False, **options)


def on_one_machine(
    engine: Path, inputs: Sequence[str | Path], output: Path, *settings: RunSettings, **options: Any
) -> RunSummary:
    with edgeseg.load(engine) as segmenter:
        return run_inputs(segmenter, inputs, output, *settings, progress=False, **options)


def photo(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    pixels = RNG.integers(0, 256, (18, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")
    return path


def photos(folder: Path, count: int) -> Path:
    for number in range(count):
        photo(folder / f"image{number}.png")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "ledger.jsonl"
    }


def as_json(summary: RunSummary, output: Path) -> dict[str, Any]:
    """What ``--json`` prints, but for times and the output's own name."""
    fields = asdict(summary)
    del fields["seconds"], fields["frames_per_second"]
    fields["written"] = [os.path.relpath(path, output) for path in fields["written"]]
    return fields


def test_masks_names_and_summary_are_those_of_one_machine(engine: Path, tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", 25)
    for name in (
        "same.jpg",
        "same.png",
        "Image3.png",
        "deep/er/image4.png",
        "deep/other/image4.png",
        "a" * 200 + ".png",
    ):
        photo(folder / name)
    (folder / "broken.png").write_bytes(b"broken")
    (folder / "link.png").symlink_to(folder / "image1.png")
    (folder / "nowhere.png").symlink_to(folder / "gone")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "list.txt").write_text("image2.png\ndeep/er/image4.png\n")
    inputs = [folder / "list.txt", folder, str(folder / "**" / "*.png")]
    one, many = tmp_path / "one", tmp_path / "many"
    expected = on_one_machine(engine, inputs, one, RunSettings(overlay=True, alpha=0.25))
    summary = on_cluster(engine, inputs, many, RunSettings(overlay=True, alpha=0.25))
    assert len(expected.failed) == 3
    assert as_json(summary, many) == as_json(expected, one)
    assert contents(many) == contents(one)


def test_a_second_run_does_what_is_missing(engine: Path, tmp_path: Path) -> None:
    folder, output = photos(tmp_path / "in", 20), tmp_path / "out"
    (folder / "broken.png").write_bytes(b"broken")
    assert on_cluster(engine, [folder], output).images == 20
    before = {path: path.stat().st_mtime_ns for path in (output / "masks").iterdir()}
    (output / "masks" / "image3.png").unlink()  # lost since
    photo(folder / "image5.png")  # another picture now
    photo(folder / "broken.png")  # repaired
    photo(folder / "new.png")
    summary = on_cluster(engine, [folder], output)
    assert (summary.images, summary.reused) == (4, 17 + 1)
    assert [Path(path).stem for path in summary.written] == ["broken", "image3", "image5", "new"]
    on_one_machine(engine, [folder], tmp_path / "one")
    assert contents(output) == contents(tmp_path / "one")
    done_again = {p.stem for p, time in before.items() if p.stat().st_mtime_ns != time}
    assert done_again == {"image3", "image5"}
    batches: list[Batch] = []
    assert on_cluster(engine, [folder], output, batches=batches).reused == 22
    assert batches == []  # nobody was hired


def test_another_engine_or_other_settings_do_not_trust_the_ledger(engine: Path, tmp_path: Path) -> None:
    folder, output = photos(tmp_path / "in", 3), tmp_path / "out"
    on_cluster(engine, [folder], output)
    other = tmp_path / "other"
    write_memory_engine(other, replace(SPEC, model=ModelSpec("custom", classes=3)))
    masks = contents(output)
    for asked, settings_ in (
        (other, RunSettings()),
        (engine, RunSettings(fit="resize")),
        (engine, RunSettings(tile_overlap=0.5)),
    ):
        with pytest.raises(OutputExistsError, match="image0.png exists"):
            on_cluster(asked, [folder], output, settings_)
    assert contents(output) == masks
    assert on_cluster(other, [folder], output, overwrite=True).images == 3
    on_one_machine(other, [folder], tmp_path / "one")
    assert contents(output) == contents(tmp_path / "one") != masks
    # What the first engine made is not there any more, whatever its lines say.
    with pytest.raises(OutputExistsError):
        on_cluster(engine, [folder], output)


def test_outputs_of_others_are_refused_before_the_work(engine: Path, tmp_path: Path) -> None:
    folder, output = photos(tmp_path / "in", 3), tmp_path / "out"
    on_cluster(engine, [folder], output)
    photo(folder / "new.png")
    (output / "masks" / "new.png").write_bytes(b"somebody's")
    batches: list[Batch] = []
    with pytest.raises(OutputExistsError, match="new.png exists; give --force"):
        on_cluster(engine, [folder], output, batches=batches)
    assert (output / "masks" / "new.png").read_bytes() == b"somebody's"
    assert batches == []
    assert on_cluster(engine, [folder], output, overwrite=True).images == 1


def test_an_output_never_replaces_an_input(engine: Path, tmp_path: Path) -> None:
    photo(tmp_path / "out" / "masks" / "a.png")
    before = contents(tmp_path / "out")
    with pytest.raises(SpecError, match="would replace the input"):
        on_cluster(engine, [tmp_path / "out" / "masks"], tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before


class Killed(BaseException):
    pass


@pytest.mark.parametrize("tear", [b"", b'{"done":[["/torn', b'\xff\x00{"begun":1}\n', b'{"begun": [3]}\n[1]\nnull\n'])
def test_a_killed_command_is_taken_up_again(engine: Path, tmp_path: Path, tear: bytes) -> None:
    folder, output, calls = photos(tmp_path / "in", 40), tmp_path / "out", []

    def fate(batch: Batch) -> str | None:
        calls.append(batch)
        if len(calls) == 3:
            # Masks that no line of the ledger tells of.
            with edgeseg.load(engine) as segmenter:
                names = [item.name for item in batch.items[:4]]
                run_inputs(segmenter, [i.place for i in batch.items[:4]], output, names=names, progress=False)
            raise Killed
        return None

    with pytest.raises(Killed):
        on_cluster(engine, [folder], output, fate=fate)
    with (output / "ledger.jsonl").open("ab") as file:
        file.write(tear)
    done = sum(len(batch.images) for batch in calls[:2])
    batches: list[Batch] = []
    summary = on_cluster(engine, [folder], output, batches=batches)
    assert (summary.reused, summary.images) == (done, 40 - done)
    assert sum(len(batch.images) for batch in batches) == 40 - done
    on_one_machine(engine, [folder], tmp_path / "one")
    assert contents(output) == contents(tmp_path / "one")
    assert on_cluster(engine, [folder], output).reused == 40


def test_what_a_dead_worker_had_is_done_again(engine: Path, tmp_path: Path) -> None:
    folder, output, calls = photos(tmp_path / "in", 60), tmp_path / "out", []

    def fate(batch: Batch) -> str | None:
        calls.append(batch)
        return "dies" if len(calls) in (2, 4) else None

    summary = on_cluster(engine, [folder], output, fate=fate)
    assert (summary.images, summary.failed) == (60, ())
    on_one_machine(engine, [folder], tmp_path / "one")
    assert contents(output) == contents(tmp_path / "one")
    lines = [json.loads(line) for line in (output / "ledger.jsonl").read_text().splitlines()]
    done = [image for line in lines for image, *_ in line.get("done", ())]
    assert len(done) == len(set(done)) == 60


def test_an_image_that_kills_its_workers_is_a_failure_and_the_only_one(engine: Path, tmp_path: Path) -> None:
    folder, output = photos(tmp_path / "in", 30), tmp_path / "out"
    alone = []

    def fate(batch: Batch) -> str | None:
        if not any(image.name == "image17" for image in batch.images):
            return None
        alone.append(len(batch.images))
        return "dies"

    summary = on_cluster(engine, [folder], output, fate=fate)
    assert summary.images == 29
    (failure,) = summary.failed
    assert failure.input == str(folder / "image17.png")
    assert (
        failure.reason
        == f"{folder / 'image17.png'} was given to 3 workers alone, and each died (out of memory?): killed"
    )
    assert alone[-3:] == [1, 1, 1]


@pytest.mark.parametrize("limit", [1, 9, 12, 30])
def test_a_limit_means_the_same_images(engine: Path, tmp_path: Path, limit: int) -> None:
    folder = photos(tmp_path / "in", 20)
    for number in (2, 9):
        (folder / f"image{number}.png").write_bytes(b"broken")
    expected = on_one_machine(engine, [folder], tmp_path / "one", limit=limit)
    assert as_json(on_cluster(engine, [folder], tmp_path / "many", limit=limit), tmp_path / "many") == as_json(
        expected, tmp_path / "one"
    )
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    # The same command again has nothing to do.
    again = on_cluster(engine, [folder], tmp_path / "many", limit=limit)
    assert (again.images, again.reused) == (0, expected.images)


def test_an_error_of_the_engine_ends_the_run(engine: Path, tmp_path: Path) -> None:
    def fate(batch: Batch) -> str | None:
        raise BuildError("the engine failed")

    with pytest.raises(BuildError, match="the engine failed"):
        on_cluster(engine, [photos(tmp_path / "in", 3)], tmp_path / "out", fate=fate)


def test_two_runs_do_not_write_in_one_folder(engine: Path, tmp_path: Path) -> None:
    folder, output = photos(tmp_path / "in", 3), tmp_path / "out"

    def fate(batch: Batch) -> str | None:
        with pytest.raises(ArtifactError, match="another run is writing in"):
            on_cluster(engine, [folder], output)
        return None

    assert on_cluster(engine, [folder], output, fate=fate).images == 3


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("clip.mp4", SpecError, "clip.mp4 is a video, and a cluster takes images; segment it without --executor ray"),
        ("0", SpecError, "0 is a camera"),
        ("missing.png", InputError, "missing.png does not exist"),
        ("*.jpg", InputError, r"no file matches"),
        ("", InputError, "no images in"),
        ("memory://nothing", InputError, "memory://nothing does not exist"),
        ("nonsense://a/b", SpecError, "cannot reach nonsense://a/b"),
    ],
)
def test_inputs_that_cannot_be(
    name: str, error: type[EdgesegError], said: str, engine: Path, tmp_path: Path, bucket: object
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "clip.mp4").write_bytes(b"film") if name == "clip.mp4" else None
    place = name if "://" in name or name == "0" else str(tmp_path / "in" / name)
    with pytest.raises(error, match=said):
        on_cluster(engine, [place], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_workers_do_not_write_into_their_own_memory(engine: Path, tmp_path: Path, bucket: object) -> None:
    folder = photos(tmp_path / "in", 2)
    with pytest.raises(SpecError, match="which no worker sees; give a folder or a bucket"):
        run_on_cluster(engine, [folder], "memory://masks", RunSettings(), progress=False)


def test_a_worker_of_another_version_is_refused(engine: Path, tmp_path: Path) -> None:
    job = Job(((str(engine), "key"),), "0.0.1", RunSettings(), False, str(tmp_path), 1)
    with pytest.raises(SpecError, match=r"this node has edgeseg .*, the run was begun with 0.0.1"):
        Worker(job, lambda number: {})


def test_a_file_url_is_a_path(engine: Path, tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", 2)
    summary = on_cluster(engine, [f"file://{folder}"], f"file://{tmp_path}/out")
    assert summary.written == tuple(str(tmp_path / "out" / "masks" / f"image{i}.png") for i in range(2))


# Buckets.


def fill(bucket: Any, folder: Path, url: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.pipe_file(f"{url}/{path.relative_to(folder)}", path.read_bytes())


def stored(bucket: Any, url: str) -> dict[str, bytes]:
    names = bucket.find(url)
    return {name.removeprefix(f"/{url.split('://')[1]}/"): bucket.cat_file(name) for name in names}


def test_from_bucket_to_bucket(engine: Path, tmp_path: Path, bucket: Any) -> None:
    folder = photos(tmp_path / "in", 12)
    photo(folder / "image3.jpg")
    photo(folder / "below" / "image1.png")
    (folder / "broken.png").write_bytes(b"broken")
    fill(bucket, folder, "memory://photos")
    expected = on_one_machine(engine, [folder], tmp_path / "one", RunSettings(overlay=True))
    summary = on_cluster(engine, ["memory://photos"], "memory://masks", RunSettings(overlay=True))
    assert summary.images == expected.images == 13
    assert list(summary.written) == [path.replace(str(tmp_path / "one"), "memory://masks") for path in expected.written]
    (failure,), (local_failure,) = summary.failed, expected.failed
    assert failure.input == "memory:///photos/broken.png"  # as fsspec names it
    assert failure.reason == local_failure.reason.replace(local_failure.input, failure.input)
    there = stored(bucket, "memory://masks")
    assert {name: data for name, data in there.items() if not name.startswith("ledger/")} == contents(tmp_path / "one")
    # What is done is not done again; what has changed or is new is.
    photo(folder / "image4.png")
    photo(folder / "new.png")
    for name in ("image4.png", "new.png"):
        bucket.pipe_file(f"memory://photos/{name}", (folder / name).read_bytes())
    again = on_cluster(engine, ["memory://photos"], "memory://masks", RunSettings(overlay=True))
    assert (again.images, again.reused) == (2, 12)
    with pytest.raises(OutputExistsError, match="memory://masks/masks/below.*exists|exists; give --force"):
        on_cluster(engine, ["memory://photos"], "memory://masks", RunSettings(overlay=False))


def test_globs_of_a_bucket_descend(engine: Path, tmp_path: Path, bucket: Any) -> None:
    folder = tmp_path / "in"
    for name in ("image1.png", "left/image1.png", "right/image1.png", "right/deep/image2.png", "right/note.txt"):
        photo(folder / name)
    fill(bucket, folder, "memory://photos")
    one = on_one_machine(engine, [str(folder / "**" / "*.png")], tmp_path / "one")
    names = [Path(path).stem for path in one.written]
    summary = on_cluster(engine, ["memory://photos/**/*.png"], tmp_path / "out")
    # Only the uppermost folder is called otherwise here.
    assert [Path(path).stem for path in summary.written] == [name.replace("in_", "photos_") for name in names]


def test_a_bucket_and_the_ledger_of_a_killed_command(
    engine: Path, tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(bucket, photos(tmp_path / "in", 40), "memory://photos")
    calls = []

    def fate(batch: Batch) -> str | None:
        calls.append(batch)
        if len(calls) == 3:
            raise Killed
        return None

    with monkeypatch.context() as patches:
        patches.setattr(ledgers, "_SECONDS_AN_OBJECT", 0.0)
        # Nothing is written any more by a command that is gone.
        patches.setattr(ledgers._Objects, "close", lambda self: None)
        with pytest.raises(Killed):
            on_cluster(engine, ["memory://photos"], "memory://masks", fate=fate)
    summary = on_cluster(engine, ["memory://photos"], "memory://masks")
    done = sum(len(batch.images) for batch in calls[:2])
    assert (summary.reused, summary.images) == (done, 40 - done)


def test_where_a_file_could_be_seen_half_written_it_is_moved(
    engine: Path, tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    class Plain(MemoryFileSystem):
        protocol = "plain"
        written: list[str] = []  # noqa: RUF012

        def pipe_file(self, path: str, *args: Any, **options: Any) -> None:
            self.written.append(path)
            super().pipe_file(path, *args, **options)

        def put_file(self, here: str, path: str, *args: Any, **options: Any) -> None:
            self.written.append(path)
            super().put_file(here, path, *args, **options)

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(super()._strip_protocol(path.replace("plain://", "memory://")))

        def unstrip_protocol(self, name: str) -> str:
            return f"plain:/{name}"

    fsspec.register_implementation("plain", Plain, clobber=True)
    summary = on_cluster(engine, [photos(tmp_path / "in", 3)], "plain://masks")
    assert summary.written == tuple(f"plain://masks/masks/image{number}.png" for number in range(3))
    assert len(Plain.written) >= 4
    assert all(path.rsplit("/", 1)[1].startswith(".edgeseg-partial-") for path in Plain.written)
    assert not [name for name in stored(bucket, "memory://masks") if "partial" in name]
    on_one_machine(engine, [tmp_path / "in"], tmp_path / "one")
    masks = {name: data for name, data in stored(bucket, "memory://masks").items() if name.startswith("masks/")}
    assert masks == contents(tmp_path / "one")


# The plan.

names = st.text(st.sampled_from("aAbB0129._- \u00e9\u0130\u00df"), min_size=1, max_size=6).filter(
    lambda name: not name.startswith(".")
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(("", "x", "y/x")), names, st.sampled_from((".png", ".jpg"))), min_size=1))
def test_order_and_names_are_those_of_a_list_in_memory(tree: list[tuple[str, str, str]]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch, "root")
        for folder, stem, suffix in tree:
            path = root / folder / f"{stem}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        pattern = str(root / "**" / "*.*")
        expected = list_images(pattern)
        with Plan([pattern]) as plan:
            images = list(plan.todo())
        assert [image.source for image in images] == [str(path) for path in expected]
        assert [image.name for image in images] == unique_names(expected)


@given(st.lists(st.text(st.sampled_from("aAb019/._\u00e9\u20ac\U0001f600"), min_size=1), min_size=2, max_size=20))
def test_bytes_sort_as_natural_keys(texts: list[str]) -> None:
    paths = [Path(text) for text in texts]
    by_bytes = sorted(paths, key=lambda path: (sort_key(path.as_posix()), path.as_posix()))
    assert by_bytes == sorted(paths, key=natural_key)


def test_a_name_that_is_no_utf8_goes_through_the_ledger(engine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    photo(folder / os.fsdecode(b"caf\xe9.png"))
    photo(folder / "caf\u00e9.png")
    assert on_cluster(engine, [folder], tmp_path / "out").images == 2
    assert on_cluster(engine, [folder], tmp_path / "out").reused == 2


def test_a_group_of_names_that_nothing_tells_apart_takes_no_square_of_time(tmp_path: Path) -> None:
    paths = [Path(f"/photos/{number}/same/image.png") for number in range(20_000)]
    assert unique_names(paths)[-1] == "same_image_png-20000"


def test_the_ledger_says_in_words_what_it_is_of(engine: Path, tmp_path: Path) -> None:
    on_cluster(engine, [photos(tmp_path / "in", 1)], tmp_path / "out", RunSettings(fit="resize"))
    run, begun, done = map(json.loads, (tmp_path / "out" / "ledger.jsonl").read_text().splitlines())
    assert run["about"]["names"] == ["engine"]
    assert run["about"]["fit"] == "resize"
    image = str(tmp_path / "in" / "image0.png")
    assert begun == {"begun": [image]}
    assert [row[0] for row in done["done"]] == [image]


# How many workers.


@pytest.mark.parametrize(
    ("nodes", "gpus", "workers", "expected"),
    [
        ([{"CPU": 2}], 0, None, (2, 1)),
        ([{"CPU": 2}], 0, 2, (1, 2)),
        ([{"CPU": 64}] * 3, 0, None, (4, 48)),
        ([{"CPU": 64}, {"CPU": 6}], 0, None, (4, 17)),
        ([{"CPU": 64}, {"CPU": 1}], 0, None, (1, 65)),
        ([{}, {"CPU": 8, "GPU": 2}, {"CPU": 8}], 1, None, (4, 2)),
        ([{"CPU": 8}], 1, None, (4, 1)),
        ([{"CPU": 0}], 0, None, (1, 1)),
    ],
)
def test_shares(nodes: list[dict[str, float]], gpus: int, workers: int | None, expected: tuple[int, int]) -> None:
    assert shares(nodes, gpus, workers) == expected


# The command line.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--output", "out", "--executor", "ray", "--threads", "1"], "--threads goes with a run on this machine"),
        (["--output", "out", "--jobs", "2"], "--jobs and --ray-address go with --executor ray"),
        (["--output", "out", "--ray-address", "auto"], "--jobs and --ray-address go with --executor ray"),
        (["--output", "memory://out"], "URLs go with --executor ray"),
        (["--output", "out", "memory://photos"], "URLs go with --executor ray"),
        (
            ["--output", "out", "rtsp://camera/1"],
            "rtsp://camera/1 is a stream of the network, which is not opened here; in Python",
        ),
    ],
)
def test_options_of_a_cluster_need_one(options: list[str], said: str, engine: Path) -> None:
    result = CliRunner().invoke(cli, ["run", str(engine), "photo.png", *options])
    assert result.exit_code == 2
    assert said in result.output


def test_the_command_is_the_same_but_for_the_executor(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def here(job: Job, engines: Sequence[Engine], bar: object) -> Iterator[Pool]:
        yield HerePool(job, engines, lambda batch: None)

    monkeypatch.setattr("edgeseg.cluster.run._on_ray", lambda workers, address: here)
    folder = photos(tmp_path / "in", 5)
    (folder / "broken.png").write_bytes(b"broken")
    results, options = (
        {},
        ["--overlay", "--alpha", "0.3", "--fit", "letterbox", "--tile-overlap", "0.1", "--limit", "4"],
    )
    for executor in ("local", "ray"):
        output = tmp_path / executor
        words = ["run", str(engine), str(folder), "--output", str(output), "--executor", executor, "--json", *options]
        result = CliRunner().invoke(cli, words)
        said = json.loads(result.stdout)
        del said["seconds"], said["frames_per_second"]
        said["written"] = [path.replace(str(output), "") for path in said["written"]]
        results[executor] = (result.exit_code, result.stderr, said, contents(output))
    assert results["ray"] == results["local"]
    assert results["ray"][0] == 1
    assert len(results["ray"][3]) == 8


def test_without_ray_the_line_to_type_is_named(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    words = [
        "run",
        str(engine),
        str(photos(tmp_path / "in", 1)),
        "--output",
        str(tmp_path / "out"),
        "--executor",
        "ray",
    ]
    result = CliRunner().invoke(cli, words)
    assert isinstance(result.exception, MissingDependencyError)
    assert "pip install 'edgeseg[cluster]'" in str(result.exception)


def test_errors_of_a_worker_arrive_as_they_were() -> None:
    for error in (BuildError("a"), MissingDependencyError("ray", "cluster", "run"), DeviceError("no", "CUDA_ERROR")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))


def test_a_node_that_does_not_see_the_folders_is_refused(engine: Path, tmp_path: Path) -> None:
    job = Job(
        ((str(engine), "key"),), edgeseg.__version__, RunSettings(), False, str(tmp_path), 1, (str(tmp_path / "nfs"),)
    )
    with pytest.raises(InputError, match=r"this node does not see .*nfs; mount it there"):
        Worker(job, lambda number: {})


def test_what_is_printed_while_ray_runs_does_not_get_into_the_json(capfd: pytest.CaptureFixture[str]) -> None:
    print("before")
    with kept_stdout():
        print("(raylet) The node has been marked dead")
        os.write(1, b"from compiled code")
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"


def test_a_node_of_another_kind_builds_its_own_engine_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGESEG_CACHE", str(tmp_path / "cache"))
    folder = folder_for(tmp_path / "engine", "onnxruntime", own_scheme())
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    stale = json.loads(files["manifest.json"])
    stale["versions"]["onnxruntime"] = "1.0"
    files["manifest.json"] = json.dumps(stale).encode()
    job = Job((("engines/a", "key"),), edgeseg.__version__, USUAL, False, str(tmp_path / "out"), 1)
    with pytest.raises(
        StaleEngineError, match=r"^engines/a was built with onnxruntime 1.0.*run: edgeseg compile engines/a$"
    ):
        Worker(job, lambda number: files)
    items = [Item(str(photo(tmp_path / "a.png")), "a.png", "a")]
    with Worker(replace(job, recompile=True), lambda number: files) as worker:
        assert worker.segment(items, overwrite=False) == [Outcome(None)]
    # It is built once a node.
    monkeypatch.setattr("edgeseg.backends.compile.recompile", None)
    with Worker(replace(job, recompile=True), lambda number: {}) as worker:
        assert worker.segment(items, overwrite=True) == [Outcome(None)]
    on_one_machine(folder, [tmp_path / "a.png"], tmp_path / "one")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_a_worker_leaves_processors_to_others(tmp_path: Path) -> None:
    engine = open_engine(folder_for(tmp_path / "engine", "onnxruntime", own_scheme()))
    assert engine.manifest.options["threads"] == 0
    assert with_threads(engine, 3).manifest.options["threads"] == 3
    two = replace(engine, manifest=replace(engine.manifest, options={**engine.manifest.options, "threads": 2}))
    assert with_threads(two, 3).manifest.options["threads"] == 2
    assert with_threads(two, None) is two
    # It is the same engine, to whatever asks which one it is.
    assert edgeseg.load(engine, threads=1).identity == edgeseg.load(engine).identity


def test_what_a_killed_worker_left_in_the_temporary_folder_goes(
    engine: Path, tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    left = tmp_path / "tmp" / f"edgeseg-{os.getuid()}" / ".edgeseg-partial-0123456789abcdef"
    photo(left / "0.png")
    fill(bucket, photos(tmp_path / "in", 2), "memory://photos")
    assert on_cluster(engine, ["memory://photos"], "memory://masks").images == 2
    assert [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()] == []
    left.parent.rmdir()
    left.parent.symlink_to(tmp_path)
    photo(tmp_path / "in" / "new.png")
    bucket.pipe_file("memory://photos/new.png", (tmp_path / "in" / "new.png").read_bytes())
    with pytest.raises(InputError, match="is somebody else's"):
        on_cluster(engine, ["memory://photos"], "memory://masks")


# What else a run can be asked for.


def chip(path: Path) -> Path:
    """A small georeferenced image."""
    rasterio = pytest.importorskip("rasterio", reason="rasterio is not installed: pip install 'edgeseg[raster]'")
    path.parent.mkdir(parents=True, exist_ok=True)
    place = rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 4_600_000)
    planes = RNG.integers(1, 256, (3, 24, 40), dtype=np.uint8)
    form = {"height": 24, "width": 40, "count": 3, "dtype": "uint8", "crs": "EPSG:32633", "transform": place}
    with without_warnings(), rasterio.open(path, "w", driver="GTiff", **form) as file:
        file.write(planes)
    return path


@pytest.mark.parametrize("use", [None, False, True])
def test_rasters_are_those_of_one_machine(use: bool | None, engine: Path, tmp_path: Path, bucket: Any) -> None:
    folder = tmp_path / "in"
    for name in ("chip1.tif", "chip2.tif"):
        chip(folder / name)
    if not use:
        photo(folder / "photo.png")
        photo(folder / "plain.tif")
    rasters = RasterOptions(use=use)
    expected = on_one_machine(engine, [folder], tmp_path / "one", RunSettings(rasters=rasters))
    suffix = ".png" if use is False else ".tif"
    assert {Path(path).suffix for path in expected.written if "chip" in path} == {suffix}
    summary = on_cluster(engine, [folder], tmp_path / "many", RunSettings(rasters=rasters))
    assert as_json(summary, tmp_path / "many") == as_json(expected, tmp_path / "one")
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert on_cluster(engine, [folder], tmp_path / "many", RunSettings(rasters=rasters)).reused == expected.images
    # From a bucket to a bucket, and again.
    fill(bucket, folder, "memory://chips")
    for times in range(2):
        again = on_cluster(engine, ["memory://chips"], "memory://masks", RunSettings(rasters=rasters))
        assert (again.images, again.reused) == ((expected.images, 0), (0, expected.images))[times]
    there = stored(bucket, "memory://masks")
    assert {name for name in there if not name.startswith("ledger/")} == set(contents(tmp_path / "one"))


def test_what_no_raster_is_is_refused_before_the_work(engine: Path, tmp_path: Path) -> None:
    folder, batches = photos(tmp_path / "in", 2), list[Batch]()
    with pytest.raises(SpecError, match=r"image0.png is no raster"):
        on_cluster(engine, [folder], tmp_path / "out", RunSettings(rasters=RasterOptions(use=True)), batches=batches)
    chip(tmp_path / "in" / "chip.tif")
    with pytest.raises(SpecError, match="rasters are cut into tiles; leave out --fit resize"):
        on_cluster(engine, [tmp_path / "in" / "chip.tif"], tmp_path / "out", RunSettings(fit="resize"))
    assert not (tmp_path / "out" / "masks").exists()


def test_ensembles_and_augmentation_are_those_of_one_machine(tmp_path: Path, engine: Path) -> None:
    for name, kind in (("a", "logits"), ("b", "probabilities")):
        write_memory_engine(tmp_path / name, replace(SPEC, output=OutputSpec(kind)))  # type: ignore[arg-type]
    folder = photos(tmp_path / "in", 3)
    with edgeseg.load(tmp_path / "a", ensemble=[tmp_path / "b"], tta="d4") as segmenter:
        run_inputs(segmenter, [folder], tmp_path / "one", progress=False)
    on_cluster(tmp_path / "a", [folder], tmp_path / "many", RunSettings(tta="d4"), ensemble=[tmp_path / "b"])
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    for settings_, others in ((USUAL, [tmp_path / "b"]), (RunSettings(tta="d4"), [])):
        with pytest.raises(OutputExistsError):
            on_cluster(tmp_path / "a", [folder], tmp_path / "many", settings_, ensemble=others)
