"""Memory of a device as CuPy describes it, for the tests that stand in for other libraries."""

from __future__ import annotations


class Described:
    """Has ``__cuda_array_interface__``: uint8 unless ``typestr`` says otherwise, and nothing to wait for."""

    def __init__(self, address: int, shape: tuple[int, ...], **others: object) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            **others,
        }
