"""Where calibration images come from, which are taken, and what identifies a set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgeseg.errors import InputError
from edgeseg.images.placement import fit
from edgeseg.quantize import samples
from edgeseg.quantize.samples import MINIMUM_IMAGES, CalibrationSet
from edgeseg.spec import InputSpec

SPEC = InputSpec(32, 64)


def pictures(count: int, height: int = 24, width: int = 40) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    root.mkdir()
    for k, image in enumerate(pictures(10)):
        Image.fromarray(image).save(root / f"frame{k}.png")
    return root


def pixels(samples: CalibrationSet) -> list[bytes]:
    return [image.tobytes() for _, image in samples.named_images(3)]


def test_folder_glob_list_and_arrays_are_the_same_images(folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("# calibration\n" + "".join(f"photos/frame{k}.png\n" for k in range(10)) + "\n")
    stacked = np.stack(pictures(10))
    np.save(tmp_path / "stack.npy", stacked)
    np.savez(tmp_path / "stack.npz", a=stacked[:4], b=stacked[4:])
    nested = tmp_path / "nested"
    (nested / "masks").mkdir(parents=True)
    (nested / "images").symlink_to(folder)
    sources = [
        folder,
        str(folder),
        str(folder / "frame*.png"),
        listed,
        nested,
        tmp_path / "stack.npy",
        tmp_path / "stack.npz",
        stacked,
        pictures(10),
        iter(pictures(10)),
        sorted(folder.iterdir()),
    ]
    expected = [image.tobytes() for image in pictures(10)]
    for source in sources:
        samples = CalibrationSet.open(source)
        assert pixels(samples) == expected, source
        assert (len(samples), samples.skipped) == (10, ())


@pytest.mark.parametrize("mask", ["frame{}_mask.png", "frame{}_gt.bmp", "frame{}_label.tif"])
def test_masks_in_the_folder_of_their_images_are_no_images(folder: Path, mask: str) -> None:
    """Half of what is calibrated on would be black but for a few grey levels."""
    alone = pixels(CalibrationSet.open(folder))
    for k, image in enumerate(pictures(10)):
        Image.fromarray((image[..., 0] > 128).astype(np.uint8)).save(folder / mask.format(k))
    assert pixels(CalibrationSet.open(folder)) == alone


def test_image_listed_twice_counts_once(folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"photos/frame{k % 9}.png\n" for k in range(20)))
    assert len(CalibrationSet.open(listed)) == 9


def test_a_picture_that_is_there_twice_is_taken_once_whatever_its_file(folder: Path) -> None:
    (folder / "copy of frame3.png").write_bytes((folder / "frame3.png").read_bytes())
    for name in ("frame4.bmp", "frame4 again.tif"):
        Image.open(folder / "frame4.png").save(folder / name)
    np.save(folder / "frame5.npy", pictures(6)[5])
    samples = CalibrationSet.open(folder)
    assert len(samples) == 10
    assert {image.tobytes() for _, image in samples.named_images(3)} == {image.tobytes() for image in pictures(10)}
    assert len(samples.skipped) == 4
    assert all(reason.startswith("the same picture as ") for _, reason in samples.skipped)
    # A copy never stands for another picture when some are chosen, and never is held out.
    for seed in range(5):
        chosen = CalibrationSet.open(folder, limit=10, seed=seed)
        kept, held = chosen.hold_out(2)
        assert (len(kept), len(held), set(kept.pixels) & set(held.pixels)) == (5, 5, set())


def test_images_of_a_single_colour_give_no_ranges() -> None:
    greys = [np.full((24, 40, 3), 20 * k, np.uint8) for k in range(9)]
    with pytest.raises(InputError, match="each of the 9 images in the given images is of a single colour"):
        CalibrationSet.open(greys)
    assert len(CalibrationSet.open([*greys, *pictures(1)])) == 10


def test_digest_is_of_content_not_of_names_or_order(folder: Path, tmp_path: Path) -> None:
    digest = CalibrationSet.open(folder).digest
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for k in range(10):
        (renamed / f"z{9 - k}.png").write_bytes((folder / f"frame{k}.png").read_bytes())
    assert CalibrationSet.open(renamed).digest == digest
    changed = bytearray((renamed / "z0.png").read_bytes())
    (renamed / "z0.png").write_bytes(changed + b"\0")
    assert CalibrationSet.open(renamed).digest != digest
    arrays = pictures(10)
    assert CalibrationSet.open(arrays).digest == CalibrationSet.open(arrays[::-1]).digest
    assert CalibrationSet.open(arrays).digest != CalibrationSet.open(arrays[:9]).digest
    # The same bytes in another shape are another image.
    turned = [image.reshape(40, 24, 3) for image in arrays]
    assert CalibrationSet.open(turned).digest != CalibrationSet.open(arrays).digest


def test_subset_depends_on_the_seed_alone(folder: Path) -> None:
    first = CalibrationSet.open(folder, limit=5, seed=1)
    assert first.names == CalibrationSet.open(folder, limit=5, seed=1).names
    assert len(first) == 5
    assert list(first.names) == sorted(first.names)
    others = {CalibrationSet.open(folder, limit=5, seed=seed).names for seed in range(8)}
    assert len(others) > 3
    assert CalibrationSet.open(folder, limit=50).names == CalibrationSet.open(folder).names


def test_unusable_images_are_skipped_by_name_and_replaced(folder: Path) -> None:
    (folder / "a_empty.png").write_bytes(b"")
    (folder / "b_text.jpg").write_text("not an image")
    whole = (folder / "frame3.png").read_bytes()
    (folder / "frame3.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (300, 4)).save(folder / "sliver.png")
    samples = CalibrationSet.open(folder)
    assert len(samples) == 9
    reasons = dict(samples.skipped)
    assert sorted(reasons) == ["a_empty.png", "b_text.jpg", "frame3.png", "sliver.png"]
    assert "0 bytes" in reasons["a_empty.png"]
    assert "4x300" in reasons["sliver.png"]
    for seed in range(5):
        assert len(CalibrationSet.open(folder, limit=8, seed=seed)) == 8


def test_too_few_usable_images_are_refused(folder: Path) -> None:
    for k in range(4):
        (folder / f"frame{k}.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"only 6 of 10 .*4 skipped: frame0\.png.*and 1 more.*at least 8") as caught:
        CalibrationSet.open(folder)
    assert "\n" not in str(caught.value)
    assert len(CalibrationSet.open(folder, minimum=6)) == 6
    assert len(CalibrationSet.open(folder, limit=3)) == 3


def test_fewest_images_is_a_stated_number() -> None:
    assert len(CalibrationSet.open(pictures(MINIMUM_IMAGES))) == MINIMUM_IMAGES
    with pytest.raises(InputError, match="limit is 0"):
        CalibrationSet.open(pictures(8), limit=0)


@pytest.mark.parametrize("kind", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_become_rgb(tmp_path: Path, kind: str) -> None:
    for k, grey in enumerate(pictures(8)):
        Image.fromarray(grey).convert(kind).save(tmp_path / f"{k}.{'tif' if kind == 'CMYK' else 'png'}")
    shapes = {image.shape for image in CalibrationSet.open(tmp_path).images(SPEC)}
    assert shapes == {(1, 32, 64, 3)}


def test_unreadable_folder_and_file_are_refused(folder: Path, tmp_path: Path) -> None:
    def denied(path: Path) -> bool:
        path.chmod(0)
        try:
            list(path.iterdir())
        except PermissionError:
            return True
        return False

    if not denied(folder):
        folder.chmod(0o755)
        pytest.skip("this user may read everything")
    try:
        with pytest.raises(InputError, match="cannot list"):
            CalibrationSet.open(folder)
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("x.npy", lambda p: np.save(p, np.zeros((0, 24, 40, 3), np.uint8)), "uint8 of shape"),
        ("x.npy", lambda p: np.save(p, np.zeros((9, 24, 40, 4), np.uint8)), "has 4 channels, the model takes 3"),
        ("x", lambda p: p.mkdir(), "no images in"),
        ("x", lambda p: None, "does not exist"),
        ("x*.png", lambda p: None, "no file matches"),
    ],
)
def test_useless_source_is_refused(tmp_path: Path, name: str, write: Callable[[Path], object], message: str) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(InputError, match=message) as caught:
        CalibrationSet.open(path)
    assert "\n" not in str(caught.value)


def test_arrays_of_the_wrong_type_are_refused() -> None:
    with pytest.raises(InputError, match="array 1 is float64, the engine takes uint8"):
        CalibrationSet.open([pictures(1)[0], np.zeros((24, 40, 3))])
    grey = [image[..., 0] for image in pictures(8)]
    assert [image.shape for _, image in CalibrationSet.open(grey, channels=1).named_images(1)] == [(24, 40, 1)] * 8


def test_images_are_fitted_as_at_run_time() -> None:
    arrays = pictures(8, 50, 70)
    for policy in ("resize", "letterbox"):
        spec = InputSpec(32, 64, fit=policy)
        for image, fitted in zip(arrays, CalibrationSet.open(arrays).images(spec), strict=True):
            assert (fitted[0] == fit(image, spec)[0]).all()


def test_tiles_of_a_large_image_are_all_seen() -> None:
    arrays = pictures(8, 64, 64)
    spec = InputSpec(32, 64, fit="tile")
    windows = list(CalibrationSet.open(arrays).images(spec))
    assert len(windows) > 2 * len(arrays) - 1
    assert {window.shape for window in windows} == {(1, 32, 64, 3)}
    assert (windows[0][0] == arrays[0][:32]).all()
    assert all(any(np.array_equal(window[0], image[-32:]) for window in windows) for image in arrays)


def test_hold_out_splits_without_overlap(folder: Path) -> None:
    samples = CalibrationSet.open(folder)
    kept, held = samples.hold_out(5)
    assert (len(kept), len(held)) == (8, 2)
    assert sorted(kept.names + held.names) == sorted(samples.names)
    assert not set(kept.content) & set(held.content)


def test_npy_stays_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "stack.npy"
    np.save(path, np.stack(pictures(10)))
    samples = CalibrationSet.open(path)
    assert all(isinstance(image.pixels, np.memmap) for image in samples._images)  # type: ignore[attr-defined]


def sparse_npy(path: Path, shape: tuple[int, ...]) -> Path:
    """A file that says it holds so much, of which the disk holds the header."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + int(np.prod(shape)))
    return path


def test_what_small_files_can_claim_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="an image of more than 1073741824 bytes; cut it into parts"):
        CalibrationSet.open(sparse_npy(tmp_path / "a.npy", (2, 30_000, 30_000, 3)))
    with pytest.raises(InputError, match="holds 2000000 images; calibration takes 100000"):
        CalibrationSet.open(sparse_npy(tmp_path / "b.npy", (2_000_000, 16, 16, 3)))
    np.savez_compressed(tmp_path / "c.npz", a=np.zeros((9, 30, 30, 3), np.uint8), b=np.zeros((9, 30, 30, 3), np.uint8))
    monkeypatch.setattr(samples, "MAX_ARCHIVE_BYTES", 9 * 30 * 30 * 3 * 2 - 1)
    with pytest.raises(InputError, match="c.npz: its arrays would take more than the 24299 bytes allowed"):
        CalibrationSet.open(tmp_path / "c.npz")


def test_image_that_vanishes_is_an_input_error(folder: Path) -> None:
    samples = CalibrationSet.open(folder)
    (folder / "frame4.png").unlink()
    with pytest.raises(InputError, match=r"frame4\.png"):
        list(samples.images(SPEC))
