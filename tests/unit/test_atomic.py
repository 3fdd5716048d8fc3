"""Locks, files and folders that are replaced: whoever is killed, and whenever, loses nothing and leaves nothing behind."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from test_engine_folder import make_engine

from edgeseg.errors import ArtifactError, OutputExistsError, SpecError
from edgeseg.store import atomic
from edgeseg.store.atomic import HeldError, lock, replacing, scratch_folder, write_bytes
from edgeseg.store.engine import check_engine_folder, engine_folder, open_engine
from edgeseg.store.files import check_outputs
from edgeseg.store.manifest import MANIFEST_NAME

UNIT = Path(__file__).parent
WITH_HELPERS = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(UNIT), str(UNIT.parent), os.environ.get("PYTHONPATH", "")]),
}


def engine_of_a_user(folder: Path) -> None:
    make_engine(folder, weights="old")
    (folder / "notes.txt").write_text("mine")
    (folder / "results").mkdir()
    (folder / "results" / "a.csv").write_text("1,2")


def assert_the_user_s_files_are_there(folder: Path) -> None:
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "results" / "a.csv").read_text() == "1,2"


def replace_until(step: int, folder: Path) -> None:
    """In a process of its own: replace the engine, and end without any clearing up at the ``step``-th system call."""
    calls = 0

    def dying(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == step:
                os._exit(9)
            return function(*arguments, **options)

        return call

    for place, names in (
        (os, ("rename", "replace", "unlink", "rmdir", "mkdir", "open", "close")),
        (atomic, ("_exchange",)),
    ):
        for name in names:
            setattr(place, name, dying(getattr(place, name)))
    with engine_folder(folder, force=True) as scratch:
        make_engine(scratch, weights="new")


def kill_at_every_step(place: Path, exchange: bool) -> None:
    """Run in a process without threads, which can be forked: a fresh interpreter for each step would take minutes."""
    if not exchange:
        atomic._exchange = lambda one, other: False
    seen = set()
    for step in range(1, 1000):
        folder = place / str(step) / "e"
        engine_of_a_user(folder)
        child = os.fork()
        if child == 0:
            replace_until(step, folder)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seen.add(open_engine(folder).manifest.weights)
        with pytest.raises(RuntimeError), engine_folder(folder, force=True):
            raise RuntimeError
        engine = open_engine(folder)
        assert_the_user_s_files_are_there(folder)
        assert os.listdir(folder.parent) == ["e"]
        if code == 0:
            assert engine.manifest.weights == "new"
            break
        assert code == 9
    assert step > 10
    assert seen == {"old", "new"}
    print(f"killed at {step - 1} steps")


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_any_step_of_a_replacement_nothing_is_lost(tmp_path: Path, exchange: bool) -> None:
    """``exchange`` false: as on a file system that cannot swap two names."""
    code = f"import pathlib, test_atomic; test_atomic.kill_at_every_step(pathlib.Path({str(tmp_path)!r}), {exchange})"
    done = subprocess.run([sys.executable, "-c", code], env=WITH_HELPERS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


KILLED_SOMETIME = """
import sys
from pathlib import Path
from edgeseg.store.engine import engine_folder
from test_engine_folder import make_engine
print("ready", flush=True)
for number in range(10**9):
    with engine_folder(Path(sys.argv[1]), force=True) as scratch:
        make_engine(scratch, weights=str(number))
"""


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("file/e", "file is a file"),
        ("file/a/b/e", "file is a file"),
        ("n" * 300, "File name too long"),
        ("n" * 250, "File name too long"),  # the scratch folder's is longer
        ("new/" + "n" * 300 + "/e", "File name too long"),
    ],
)
def test_a_place_for_no_folder_is_refused_before_the_work(tmp_path: Path, place: str, words: str) -> None:
    (tmp_path / "file").write_text("a user's")
    with pytest.raises(ArtifactError, match=f"^cannot write .*{words}; give another --output$"):
        check_engine_folder(tmp_path / place, force=False)
    assert os.listdir(tmp_path) == ["file"]


def test_killed_at_random_moments_nothing_is_lost(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    engine_of_a_user(folder)
    chance = random.Random(0)
    for _ in range(int(os.environ.get("EDGESEG_TEST_KILLS", "5"))):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED_SOMETIME, str(folder)], env=WITH_HELPERS, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        # Reads while the other process replaces the folder again and again: never missing, never a mix of two.
        for _ in range(chance.randrange(1, 100)):
            open_engine(folder)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        open_engine(folder)
    with engine_folder(folder, force=True) as scratch:
        make_engine(scratch)
    assert_the_user_s_files_are_there(folder)
    assert os.listdir(tmp_path) == ["e"]


def test_readers_wait_where_a_folder_has_no_name_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that cannot swap two names."""
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    folder = tmp_path / "e"
    make_engine(folder)
    failed: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        try:
            while not stop.is_set():
                open_engine(folder)
        except BaseException as exc:
            failed.append(exc)

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(100):
        with engine_folder(folder, force=True) as scratch:
            make_engine(scratch, weights=str(number))
    stop.set()
    thread.join()
    assert failed == []


def test_what_a_kill_left_behind_never_takes_the_place_of_what_came_later(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    make_engine(folder, weights="new")
    (folder / "notes.txt").write_text("later")
    make_engine(tmp_path / ".e.replaced-0123456789abcdef", weights="old")
    (tmp_path / ".e.replaced-0123456789abcdef" / "notes.txt").write_text("earlier")
    with engine_folder(folder, force=True) as scratch:
        make_engine(scratch)
    notes = {path.read_text(): path.name for path in folder.glob("notes.txt*")}
    assert notes.keys() == {"later", "earlier"}
    assert notes["later"] == "notes.txt"
    assert os.listdir(tmp_path) == ["e"]


WORKER = """
import os, sys
from pathlib import Path
from edgeseg.store.atomic import HeldError, lock
place, mode = Path(sys.argv[1]), sys.argv[2]
got = 0
while got < 50:
    try:
        with lock(place / "l", timeout_s=0 if mode == "try" else None):
            os.close(os.open(place / "inside", os.O_CREAT | os.O_EXCL))
            os.unlink(place / "inside")
            got += 1
    except HeldError:
        pass
"""


@pytest.mark.parametrize("mode", ["try", "wait"])
def test_no_two_are_inside_a_lock_whose_file_is_removed_each_time(tmp_path: Path, mode: str) -> None:
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), mode]) for _ in range(8)]
    assert [worker.wait() for worker in workers] == [0] * 8
    assert os.listdir(tmp_path) == []


def test_a_lock_is_held_once(tmp_path: Path) -> None:
    with lock(tmp_path / "l"), pytest.raises(HeldError), lock(tmp_path / "l", timeout_s=0.01):
        pass
    with lock(tmp_path / "l", timeout_s=0):
        pass


def test_what_is_not_edgesegs_stays_in_a_replaced_folder(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    engine_of_a_user(folder)
    (folder / "link").symlink_to("notes.txt")
    (folder / "old.log").write_text("of the old engine")
    manifest = make_engine(folder, extra_files=())
    assert manifest.graph.name == "model.onnx"
    with engine_folder(folder, force=True) as scratch:
        make_engine(scratch)
        (scratch / "engine.onnx").unlink()
    assert_the_user_s_files_are_there(folder)
    assert sorted(os.listdir(folder)) == ["link", MANIFEST_NAME, "model.onnx", "notes.txt", "old.log", "results"]
    assert os.readlink(folder / "link") == "notes.txt"


def test_a_users_file_with_the_name_of_a_new_one_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    make_engine(folder)
    (folder / "calibration.json").write_text("mine")
    with pytest.raises(ArtifactError, match=r"calibration\.json is not edgeseg's"):
        with engine_folder(folder, force=True) as scratch:
            make_engine(scratch)
            (scratch / "calibration.json").write_text("new")
    assert (folder / "calibration.json").read_text() == "mine"
    assert os.listdir(tmp_path) == ["e"]


@pytest.mark.parametrize(
    "manifest",
    ['{"name": "My app", "icons": [], "start_url": "/"}', '{"graph": {"name": "x"}}', "[]", "", "\x00"],
)
def test_another_programs_manifest_makes_no_engine_folder(tmp_path: Path, manifest: str) -> None:
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / MANIFEST_NAME).write_text(manifest)
    with pytest.raises(ArtifactError, match="left as it is"), engine_folder(folder, force=True):
        pass
    assert (folder / MANIFEST_NAME).read_text() == manifest


@pytest.mark.parametrize("name", ["*", "[a-z]", "?", "e", "e.replaced-1"])
def test_names_are_not_patterns(tmp_path: Path, name: str) -> None:
    others = [
        ".e.replaced-0000000000000000",
        ".other.replaced-0123456789abcdef",
        ".e.replaced-1.replaced-0123456789abcdef",
    ]
    theirs = [other for other in others if not other.startswith(f".{name}.replaced-0")]
    for other in (*others, ".edgeseg-partial-0123456789abcdef"):
        (tmp_path / other).mkdir()
    with engine_folder(tmp_path / name, force=True) as scratch:
        make_engine(scratch)
    assert sorted(os.listdir(tmp_path)) == sorted([*theirs, name])


def test_a_file_is_no_folder_to_replace(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("years of work")
    with pytest.raises(ArtifactError, match="is a file"), engine_folder(tmp_path / "thesis", force=True):
        pass
    assert (tmp_path / "thesis").read_text() == "years of work"


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "e", tmp_path / "link"
    make_engine(real, weights="old")
    link.symlink_to(real)
    with engine_folder(link, force=True) as scratch:
        make_engine(scratch, weights="new")
    assert link.is_symlink()
    assert open_engine(real).manifest.weights == "new"
    (tmp_path / "file").write_text("old")
    (tmp_path / "to-file").symlink_to("file")
    write_bytes(tmp_path / "to-file", b"new")
    assert (tmp_path / "to-file").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["disk", "file", "link", "to-file"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_says_who_may_read(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        with engine_folder(tmp_path / "e", force=False) as scratch:
            make_engine(scratch)
        write_bytes(tmp_path / "file", b"")
        with scratch_folder(tmp_path) as scratch:
            os.rename(scratch, tmp_path / "kept")
    finally:
        os.umask(old)
    modes = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    folders = {"e", "kept"}
    assert modes == {name: (0o777 if name in folders else 0o666) & ~umask for name in modes}
    assert len(modes) == 6


def test_devices_and_pipes_are_written_to(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    os.mkfifo(tmp_path / "pipe")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_bytes(tmp_path / "pipe", b"through")
    reader.join()
    assert got == [b"through"]
    before = os.stat("/dev/null")
    write_bytes(Path("/dev/null"), b"gone")
    assert os.path.samestat(before, os.stat("/dev/null"))
    for place in ("-", "/dev/stdout", "/dev/fd/1"):
        write_bytes(Path(place), f"to {place};".encode())
    assert capfdbinary.readouterr().out == b"to -;to /dev/stdout;to /dev/fd/1;"
    assert os.listdir(tmp_path) == ["pipe"]


def test_outputs_are_checked_before_the_work(tmp_path: Path) -> None:
    there, twin, folder = tmp_path / "there", tmp_path / "twin", tmp_path / "folder"
    there.write_text("")
    os.link(there, twin)
    folder.mkdir()
    new = tmp_path / "new"
    refused: list[tuple[type[Exception], str, Callable[[], None]]] = [
        (OutputExistsError, "--force", functools.partial(check_outputs, [there], force=False)),
        (SpecError, "would replace the input", functools.partial(check_outputs, [twin], force=True, inputs=[there])),
        (SpecError, "give two files", functools.partial(check_outputs, [new, tmp_path / "." / "new"], force=True)),
        (SpecError, "is a folder", functools.partial(check_outputs, [folder], force=True)),
        (ArtifactError, "there is a file; give another", functools.partial(check_outputs, [there / "a"], force=True)),
        (ArtifactError, "too long", functools.partial(check_outputs, [tmp_path / ("n" * 300)], force=True)),
    ]
    if os.geteuid() != 0:  # who may write everywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        for path in (tmp_path / "closed" / "a", tmp_path / "closed" / "b" / "a"):
            call = functools.partial(check_outputs, [path], force=True)
            refused.append((ArtifactError, "no permission to write", call))
    for kind, said, call in refused:
        with pytest.raises(kind, match=said):
            call()
    check_outputs([there, new, Path("-"), Path("/dev/null")], force=True, inputs=[Path("/dev/null")])
    check_outputs([new, Path("/dev/stdout")], force=False)


def test_a_file_s_folder_is_made(tmp_path: Path) -> None:
    check_outputs([tmp_path / "a" / "b" / "c"], force=False)
    write_bytes(tmp_path / "a" / "b" / "c", b"1")
    assert (tmp_path / "a" / "b" / "c").read_bytes() == b"1"


def test_a_file_that_appears_meanwhile_is_not_replaced_unasked(tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError), replacing(tmp_path / "a", overwrite=False) as part:
        part.write_text("late")
        (tmp_path / "a").write_text("first")
    assert (tmp_path / "a").read_text() == "first"
    assert os.listdir(tmp_path) == ["a"]


def test_what_killed_writers_left_goes_and_what_others_write_stays(tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import os, sys
        from pathlib import Path
        from edgeseg.store.atomic import replacing, scratch_folder
        place = Path(sys.argv[1])
        with replacing(place / "a", suffix=".mp4"), scratch_folder(place):
            os._exit(9)
        """
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2
    with replacing(tmp_path / "b") as part, scratch_folder(tmp_path) as scratch:
        assert {path.name for path in tmp_path.iterdir()} == {part.name, scratch.name}
        atomic._sweep_once.cache_clear()
        with replacing(tmp_path / "c"), scratch_folder(tmp_path):
            pass
        assert part.exists()
        assert scratch.exists()
    assert sorted(os.listdir(tmp_path)) == ["b", "c"]
