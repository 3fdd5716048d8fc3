"""DLPack capsules, with numpy as the other side: its capsules read by us, ours read by it (on the CPU)."""

from __future__ import annotations

import ctypes
import gc
import weakref

import numpy as np
import pytest

from edgeseg.backends.cuda import dlpack
from edgeseg.errors import InputError

VERSIONS = [None, (1, 0), (1, 3)]
"""What takers say they read; numpy before 2.1 gives tensors of DLPack before 1.0 to all of them."""


class Ours:
    """A tensor as :mod:`edgeseg.backends.cuda.dlpack` gives it away, in host memory so that numpy and torch can take it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None, **asked: object) -> object:
        array = self.array
        memory = dlpack.Memory(self, array.ctypes.data, array.shape, array.dtype)
        return dlpack.give(memory, dlpack.CPU, 0, max_version)

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


@pytest.mark.parametrize("version", VERSIONS)
def test_a_capsule_nobody_took_lets_go(version: tuple[int, int] | None) -> None:
    ours = Ours(np.arange(6, dtype=np.uint8))
    watched = weakref.ref(ours)
    capsule = ours.__dlpack__(max_version=version)
    del ours
    assert watched() is not None
    del capsule
    gc.collect()
    assert watched() is None


def both(first: object, second: object) -> None:
    raise AssertionError("its second argument cannot be had")


@pytest.mark.parametrize("version", VERSIONS)
def test_letting_go_while_an_exception_is_on_its_way(version: tuple[int, int] | None) -> None:
    """The capsule dies between the division and the handler: a destructor in Python would end the process here."""
    ours = [Ours(np.arange(6, dtype=np.uint8))]
    watched = weakref.ref(ours[0])
    with pytest.raises(ZeroDivisionError):
        both(ours.pop().__dlpack__(max_version=version), 1 // 0)
    gc.collect()
    assert watched() is None


def test_torch_takes_ours_and_lets_go_anywhere() -> None:
    torch = pytest.importorskip("torch")
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    ours = [Ours(array)]
    watched = weakref.ref(ours[0])
    taken = torch.from_dlpack(ours[0])
    assert taken.data_ptr() == array.ctypes.data
    assert taken.stride() == (12, 4, 1)
    np.testing.assert_array_equal(taken.numpy(), array)
    del taken
    gc.collect()
    with pytest.raises(ZeroDivisionError):
        both(torch.from_dlpack(ours.pop()), 1 // 0)
    gc.collect()
    assert watched() is None


def test_the_device_is_ours_not_that_of_numpy() -> None:
    array = np.arange(6, dtype=np.uint8)
    for version in VERSIONS:
        memory = dlpack.Memory(array, array.ctypes.data, array.shape, array.dtype)
        received = dlpack.receive(dlpack.give(memory, dlpack.CUDA, 3, version))
        assert (received.device_type, received.device_index) == (dlpack.CUDA, 3)
        received.release()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_copy_says_that_it_is_one(version: tuple[int, int] | None) -> None:
    array = np.arange(6, dtype=np.uint8)
    capsule = dlpack.give_copy(array, version)
    flags = flags_of(capsule)
    assert flags in (None, 2), "DLPACK_FLAG_BITMASK_IS_COPIED"
    received = dlpack.receive(capsule)
    assert received.address == array.ctypes.data
    received.release()


def flags_of(capsule: object) -> int | None:
    """Of a tensor of DLPack 1; ``None`` of an older one."""
    if "dltensor_versioned" not in repr(capsule):
        return None
    pointer = ctypes.pythonapi.PyCapsule_GetPointer(ctypes.py_object(capsule), b"dltensor_versioned")
    # version (8 bytes), context (8), deleter (8), flags
    return ctypes.c_uint64.from_address(pointer + 24).value


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="numpy has no versioned capsules before 2.1")
def test_we_read_numpys_of_dlpack_1() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    array.flags.writeable = False  # which DLPack before 1.0 cannot say; we only read
    capsule = array.__dlpack__(max_version=(1, 0))
    assert "dltensor_versioned" in repr(capsule)
    assert flags_of(capsule) == 1
    received = dlpack.receive(capsule)
    assert "used_dltensor_versioned" in repr(capsule)
    assert (received.address, received.shape) == (array.ctypes.data, (2, 3, 4))
    with pytest.raises(InputError, match="no fresh DLPack capsule"):
        dlpack.receive(capsule)
    received.release()


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="numpy has no versioned capsules before 2.1")
def test_dlpack_2_is_refused_and_stays_with_its_maker() -> None:
    class Watched(np.ndarray):
        pass

    array = np.arange(4, dtype=np.uint8).view(Watched)
    watched = weakref.ref(array)
    capsule = array.__dlpack__(max_version=(1, 0))
    pointer = ctypes.pythonapi.PyCapsule_GetPointer(ctypes.py_object(capsule), b"dltensor_versioned")
    ctypes.c_uint32.from_address(pointer).value = 2
    with pytest.raises(InputError, match=r"DLPack 2\.\d+; edgeseg reads DLPack 1"):
        dlpack.receive(capsule)
    del array, capsule
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
    received.release()  # once is enough, twice does nothing
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


def test_other_types_are_no_image() -> None:
    with pytest.raises(InputError, match="type code 5, 64 bits"):
        dlpack.receive(np.zeros(3, np.complex64).__dlpack__())
    # bits, of uint: two pixels a byte, and none that numpy has
    for bits, said in [(4, "4 bits"), (24, "24-bit")]:
        capsule = np.zeros(3, np.uint8).__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer(ctypes.py_object(capsule), b"dltensor")
        # data (8 bytes), device (8), ndim (4), type code (1), bits
        ctypes.c_uint8.from_address(pointer + 21).value = bits
        with pytest.raises(InputError, match=said):
            dlpack.receive(capsule)
