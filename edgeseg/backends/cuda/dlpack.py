"""DLPack capsules without importing the library on the other side: tensors of others in, ours out, nothing copied.

Structures and rules: https://dmlc.github.io/dlpack/latest/c_api.html and python_spec.html. A capsule named ``dltensor``
holds a ``DLManagedTensor``, one named ``dltensor_versioned`` a ``DLManagedTensorVersioned`` (DLPack 1.0 on); who takes it
renames it to ``used_...`` and calls its deleter when done.

Deleters run wherever the taker drops its tensor: in a thread without the GIL, while an exception is on its way, after the
interpreter is gone. A Python function called through ctypes survives none of these. So the capsules we give are numpy's,
whose deleters are made for it: an array over the memory, which numpy never looks into, with the device written over.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeseg.errors import InputError

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
"""Device types."""

VERSION = (1, 0)
"""The newest DLPack we ask others for; minor versions only add."""

_KINDS = {0: "i", 1: "u", 2: "f", 6: "b"}
_NAME, _USED_NAME = b"dltensor", b"used_dltensor"
_VERSIONED_NAME, _USED_VERSIONED_NAME = b"dltensor_versioned", b"used_dltensor_versioned"
_IS_COPIED = 1 << 1


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


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", _Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_api = ctypes.pythonapi
_api.PyCapsule_IsValid.argtypes = (ctypes.py_object, ctypes.c_char_p)
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_api.PyCapsule_SetName.argtypes = (ctypes.py_object, ctypes.c_char_p)


@dataclass(eq=False)
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
    _managed: Any = field(repr=False)

    def release(self) -> None:
        """Call the maker's deleter, when no work reads the memory any more; again does nothing."""
        managed, self._managed = self._managed, None
        if managed is not None and managed.deleter:
            managed.deleter(ctypes.addressof(managed))


def receive(capsule: object) -> Received:
    """Take a tensor out of what ``__dlpack__`` returned, of DLPack 1 or before.

    Raises:
        InputError: not a capsule, one that was taken before, of DLPack 2, or of a type numpy has not. It is not taken.
    """
    managed: Any
    if _api.PyCapsule_IsValid(capsule, _VERSIONED_NAME):
        managed = _Versioned.from_address(_api.PyCapsule_GetPointer(capsule, _VERSIONED_NAME))
        if managed.major != VERSION[0]:
            raise InputError(f"a tensor of DLPack {managed.major}.{managed.minor}; edgeseg reads DLPack 1 and before")
        used = _USED_VERSIONED_NAME
    elif _api.PyCapsule_IsValid(capsule, _NAME):
        managed, used = _Managed.from_address(_api.PyCapsule_GetPointer(capsule, _NAME)), _USED_NAME
    else:
        raise InputError(f"__dlpack__ returned a {type(capsule).__name__} that is no fresh DLPack capsule")
    tensor = managed.tensor
    received = Received(
        address=(tensor.data or 0) + tensor.byte_offset,
        shape=tuple(tensor.shape[: tensor.ndim]),
        strides=tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None,
        dtype=_dtype(tensor.dtype),
        device_type=tensor.device.type,
        device_index=tensor.device.index,
        _managed=managed,
    )
    _api.PyCapsule_SetName(capsule, used)
    return received


class Memory:
    """C-contiguous memory for :func:`give`. While a taker has it, this object lives."""

    def __init__(self, owner: object, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._owner = owner
        self.__array_interface__ = {"data": (address, False), "shape": shape, "typestr": dtype.str, "version": 3}


def give(memory: Memory, device_type: int, device_index: int, max_version: tuple[int, int] | None = None) -> object:
    """Make a capsule."""
    capsule, tensor, _ = _made(np.asarray(memory), max_version)
    tensor.device = _Device(device_type, device_index)
    return capsule


def give_copy(array: np.ndarray[Any, Any], max_version: tuple[int, int] | None = None) -> object:
    """Make a capsule of an array in host memory that its taker alone will have."""
    capsule, _, versioned = _made(array, max_version)
    if versioned is not None:
        versioned.flags |= _IS_COPIED
    return capsule


def _made(array: np.ndarray[Any, Any], max_version: tuple[int, int] | None) -> tuple[object, Any, _Versioned | None]:
    """A capsule of numpy's, its tensor, and its versioned part if it has one."""
    capsule: Any
    try:
        capsule = array.__dlpack__(max_version=max_version)
    except TypeError:  # numpy before 2.1
        capsule = array.__dlpack__()
    if _api.PyCapsule_IsValid(capsule, _NAME):
        return capsule, _Managed.from_address(_api.PyCapsule_GetPointer(capsule, _NAME)).tensor, None
    versioned = _Versioned.from_address(_api.PyCapsule_GetPointer(capsule, _VERSIONED_NAME))
    return capsule, versioned.tensor, versioned


def _dtype(described: Any) -> np.dtype[Any]:
    kind, bits = _KINDS.get(described.kind), described.bits
    if kind is None or described.lanes != 1 or bits % 8:
        raise InputError(
            f"a DLPack tensor of type code {described.kind}, {bits} bits, {described.lanes} lanes is no image"
        )
    try:
        return np.dtype(np.bool_ if kind == "b" else f"{kind}{bits // 8}")
    except TypeError as exc:
        raise InputError(f"a DLPack tensor of {bits}-bit numbers of kind {kind} is no image") from exc
