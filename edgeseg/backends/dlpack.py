"""DLPack capsules by ctypes: tensors of other libraries in, ours out, without a copy and without importing either.

Structures and rules: https://dmlc.github.io/dlpack/latest/c_api.html and python_spec.html. A capsule named ``dltensor``
holds a ``DLManagedTensor``; who takes it renames it to ``used_dltensor`` and calls its deleter when done.
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeseg.errors import InputError

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
"""Device types."""

_INT, _UINT, _FLOAT, _BOOL = 0, 1, 2, 6
_KINDS = {"i": _INT, "u": _UINT, "f": _FLOAT, "b": _BOOL}
_NAME, _USED_NAME = b"dltensor", b"used_dltensor"


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("index", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_CapsuleDestructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_api = ctypes.pythonapi
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, _CapsuleDestructor)
_api.PyCapsule_SetName.argtypes = (ctypes.py_object, ctypes.c_char_p)

# The same functions for an object that is being destroyed: as a plain address, so that ctypes takes no reference to it.
_is_valid_at = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_pointer_at = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))

# Tensors given away and not yet deleted by their taker, by the number in their ``context``.
_given: dict[int, tuple[object, ...]] = {}
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Received:
    """A tensor taken out of a capsule; :meth:`release` gives it back to its maker.

    Attributes:
        address: of the first element.
        strides: in elements; ``None`` for C order.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: np.dtype[Any]
    device_type: int
    device_index: int
    _managed: int

    def release(self) -> None:
        """Call the maker's deleter. Once, when no work reads the memory any more."""
        managed = _Managed.from_address(self._managed)
        if managed.deleter:
            managed.deleter(ctypes.byref(managed))


def receive(capsule: object) -> Received:
    """Take a tensor out of what ``__dlpack__`` returned. Raises :class:`InputError` for what is not one."""
    if not _is_valid_at(id(capsule), _NAME):
        raise InputError(f"__dlpack__ returned a {type(capsule).__name__} that is no fresh DLPack capsule")
    address = int(_pointer_at(id(capsule), _NAME))
    tensor = _Managed.from_address(address).tensor
    kinds = {number: kind for kind, number in _KINDS.items()}
    if tensor.dtype.kind not in kinds or tensor.dtype.lanes != 1:
        raise InputError(f"a DLPack tensor of type code {tensor.dtype.kind} is not an image; give uint8")
    kind, bytes_each = kinds[tensor.dtype.kind], (tensor.dtype.bits + 7) // 8
    received = Received(
        address=(tensor.data or 0) + tensor.byte_offset,
        shape=tuple(tensor.shape[: tensor.ndim]),
        strides=tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None,
        dtype=np.dtype(np.bool_ if kind == "b" else f"{kind}{bytes_each}"),
        device_type=tensor.device.type,
        device_index=tensor.device.index,
        _managed=address,
    )
    _api.PyCapsule_SetName(capsule, _USED_NAME)
    return received


def give(
    owner: object, address: int, shape: tuple[int, ...], dtype: np.dtype[Any], device_type: int, device_index: int
) -> object:
    """Make a capsule of C-contiguous memory; ``owner`` is kept alive until the taker is done with it."""
    number = next(_numbers)
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    managed = _Managed()
    managed.tensor.data = address
    managed.tensor.device = _Device(device_type, device_index)
    managed.tensor.ndim = len(shape)
    managed.tensor.dtype = _DataType(_KINDS[dtype.kind], 8 * dtype.itemsize, 1)
    managed.tensor.shape = ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64))
    managed.tensor.strides = None
    managed.tensor.byte_offset = 0
    managed.context = number
    managed.deleter = _DELETE
    _given[number] = (owner, sizes, managed)
    return _api.PyCapsule_New(ctypes.addressof(managed), _NAME, _DESTROY)


def _delete(managed: Any) -> None:
    _given.pop(managed.contents.context, None)


def _destroy(capsule: int) -> None:
    # A capsule that nobody took still carries its first name.
    if _is_valid_at(capsule, _NAME):
        _given.pop(_Managed.from_address(_pointer_at(capsule, _NAME)).context, None)


# Kept for the whole process: C holds their addresses.
_DELETE, _DESTROY = _Deleter(_delete), _CapsuleDestructor(_destroy)
