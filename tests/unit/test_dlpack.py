"""DLPack by ctypes, with numpy as the other side: its capsules read by us, ours read by it (on the CPU)."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from edgeseg.backends import dlpack
from edgeseg.errors import InputError


class Ours:
    """A tensor as :mod:`edgeseg.backends.dlpack` gives it away, in host memory so that numpy can take it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **asked: object) -> object:
        array = self.array
        return dlpack.give(self, array.ctypes.data, array.shape, array.dtype, dlpack.CPU, 0)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CPU, 0


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, np.float16, np.bool_, np.int64])
def test_numpy_reads_ours(dtype: type) -> None:
    array = np.random.default_rng(0).integers(0, 2, (3, 4, 5)).astype(dtype)
    taken = np.from_dlpack(Ours(array))
    assert taken.dtype == dtype
    assert taken.ctypes.data == array.ctypes.data, "not a copy"
    np.testing.assert_array_equal(taken, array)


def test_ours_live_until_the_taker_lets_go() -> None:
    ours = Ours(np.arange(6, dtype=np.uint8))
    watched = weakref.ref(ours)
    taken = np.from_dlpack(ours)
    del ours
    gc.collect()
    assert watched() is not None
    np.testing.assert_array_equal(taken, np.arange(6))
    del taken
    gc.collect()
    assert watched() is None


def test_a_capsule_nobody_took_lets_go() -> None:
    ours = Ours(np.arange(6, dtype=np.uint8))
    watched = weakref.ref(ours)
    capsule = ours.__dlpack__()
    del ours
    assert watched() is not None
    del capsule
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64])
def test_we_read_numpys(dtype: type) -> None:
    array = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    received = dlpack.receive(array.__dlpack__())
    assert (received.address, received.shape, received.dtype) == (array.ctypes.data, (2, 3, 4), dtype)
    assert (received.device_type, received.device_index) == (dlpack.CPU, 0)
    assert received.strides in (None, (12, 4, 1))
    turned = dlpack.receive(array.transpose(2, 0, 1).__dlpack__())
    assert turned.strides == (1, 12, 4)
    received.release()
    turned.release()


def test_reading_lets_go_of_numpys_array() -> None:
    class Watched(np.ndarray):
        pass

    array = np.arange(4, dtype=np.uint8).view(Watched)
    watched = weakref.ref(array)
    received = dlpack.receive(array.__dlpack__())
    del array
    gc.collect()
    assert watched() is not None
    received.release()
    gc.collect()
    assert watched() is None


def test_a_capsule_is_taken_once() -> None:
    capsule = np.arange(4, dtype=np.uint8).__dlpack__()
    dlpack.receive(capsule).release()
    with pytest.raises(InputError, match="no fresh DLPack capsule"):
        dlpack.receive(capsule)
    with pytest.raises(InputError, match="int that is no fresh DLPack capsule"):
        dlpack.receive(3)


def test_complex_numbers_are_no_image() -> None:
    with pytest.raises(InputError, match="type code 5"):
        dlpack.receive(np.zeros(3, np.complex64).__dlpack__())
