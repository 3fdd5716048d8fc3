"""Images and results in the GPU's memory on the stub driver, rule by rule of the two protocols.

The stub is lazy: work happens when somebody waits for it. What is read too early shows as wrong bytes, what is read too
late as bytes of another image.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from described import Described
from simulated import RNG, SIDE, Simulation, an_image, model, session
from stub_cuda import LAUNCH_FAILED, Stub

from edgeseg.backends.cuda import dlpack
from edgeseg.backends.cuda.device import Cuda, Stream, open_cuda
from edgeseg.backends.cuda.driver import DriverName
from edgeseg.backends.tensorrt.options import SessionOptions
from edgeseg.backends.tensorrt.session import TensorRTSession
from edgeseg.errors import DeviceError, InputError
from edgeseg.spec import BatchRange


@pytest.fixture
def other(stub: Stub, driver: DriverName) -> Iterator[Other]:
    with open_cuda(driver) as cuda:
        yield Other(stub, cuda)


class Other:
    """Another library: its arrays, and the stream it works on."""

    def __init__(self, stub: Stub, cuda: Cuda) -> None:
        self.stub = stub
        self.cuda = cuda
        self.stream = cuda.stream()

    def image(self, array: np.ndarray, *, stream: Stream | None = None) -> int:
        """The address of a copy that ``stream`` has not yet made."""
        memory = self.cuda.device_memory(array.nbytes)
        with self.cuda.active():
            (stream or self.stream).copy_to_device(memory.address, array.reshape(-1).view(np.uint8))
        return memory.address

    def finished(self, array: np.ndarray) -> int:
        address = self.image(array)
        with self.cuda.active():
            self.stream.synchronize()
        return address

    def blocking_stream(self) -> int:
        """A stream that the default stream waits for."""
        made = ctypes.c_void_p()
        with self.cuda.active():
            self.stub._library.cuStreamCreate(ctypes.byref(made), 0)
        assert made.value is not None
        return made.value

    def destroy(self, stream: int) -> None:
        with self.cuda.active():
            self.stub._library.cuStreamDestroy_v2(ctypes.c_void_p(stream))


def mask_of(opened: TensorRTSession, image: object) -> np.ndarray:
    with opened.run_device(image)["mask"] as mask:
        return mask.numpy()


# -- __cuda_array_interface__ as a consumer ---------------------------------------------------------------------------


def test_no_stream_means_no_waiting(simulation: Simulation, opened: TensorRTSession, stub: Stub, other: Other) -> None:
    array = an_image()
    address = other.finished(array)
    for described in (Described(address, array.shape), Described(address, array.shape, stream=None)):
        stub.record_calls()
        np.testing.assert_array_equal(mask_of(opened, described), simulation.masks(array))
        assert "cuEventRecord" not in stub.calls()


def test_the_stream_named_is_waited_for(simulation: Simulation, opened: TensorRTSession, other: Other) -> None:
    array = an_image()
    described = Described(other.image(array), array.shape, stream=other.stream.address)
    np.testing.assert_array_equal(mask_of(opened, described), simulation.masks(array))


@pytest.mark.parametrize(
    "named",
    [{"stream": 1}, {"stream": 2}, {"stream": 0}, {"version": 2}, {"version": 1, "stream": None}],
    ids=["default", "per thread", "ambiguous", "version 2", "version 1"],
)
def test_default_streams_are_waited_for(
    simulation: Simulation, driver: DriverName, stub: Stub, other: Other, named: dict[str, object]
) -> None:
    """And with them the work of every blocking stream, which the default stream waits for."""
    array = an_image()
    memory = other.cuda.device_memory(array.nbytes)
    theirs = other.blocking_stream()
    source = array.reshape(-1).view(np.uint8)
    with other.cuda.active():
        copy = stub._library.cuMemcpyHtoDAsync_v2
        copy(ctypes.c_uint64(memory.address), ctypes.c_void_p(source.ctypes.data), ctypes.c_size_t(source.nbytes),
             ctypes.c_void_p(theirs))  # fmt: skip
    with session(simulation, driver) as opened:
        np.testing.assert_array_equal(
            mask_of(opened, Described(memory.address, array.shape, **named)), simulation.masks(array)
        )
    other.destroy(theirs)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"strides": (2 * SIDE * SIDE * 3, SIDE * 3, 3, 1)}, None),  # one image: its stride to the next does not matter
        ({"strides": (SIDE * SIDE * 3, 3 * SIDE + 32, 3, 1)}, "strides are .*not those of C order.*copy it first"),
        ({"strides": (SIDE * 3, 3, 1)}, "strides are"),
        ({"mask": object()}, "has a mask"),
        ({"typestr": "<f4"}, "float32; give uint8"),
        ({"typestr": "nonsense"}, r"__cuda_array_interface__ of the Described is not readable \(TypeError"),
        ({"data": None}, "is not readable"),
        ({"data": (0, False)}, "address 0x0 is not of memory the GPU can use"),
        ({"data": (4096, False)}, "address 0x1000 is not of memory the GPU can use"),
    ],
)
def test_what_is_described(
    simulation: Simulation, opened: TensorRTSession, other: Other, changed: dict[str, Any], said: str | None
) -> None:
    array = an_image()
    address = other.finished(array)
    if said is None:
        np.testing.assert_array_equal(
            mask_of(opened, Described(address, array.shape, **changed)), simulation.masks(array)
        )
        return
    with pytest.raises(InputError, match=said):
        opened.run_device(Described(address, array.shape, **changed))
    np.testing.assert_array_equal(mask_of(opened, Described(address, array.shape)), simulation.masks(array))


def test_what_must_be_described(simulation: Simulation, opened: TensorRTSession, other: Other) -> None:
    array = an_image()
    described = Described(other.finished(array), array.shape)
    for key in ("shape", "typestr", "data", "version"):
        value = described.__cuda_array_interface__.pop(key)
        with pytest.raises(InputError, match=rf"not readable \(KeyError\('{key}'\)\)"):
            opened.run_device(described)
        described.__cuda_array_interface__[key] = value
    np.testing.assert_array_equal(mask_of(opened, described), simulation.masks(array))


def test_an_image_of_another_gpu(
    simulation: Simulation, driver: DriverName, other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = an_image()
    described = Described(other.finished(array), array.shape)
    with session(simulation, driver) as opened:
        monkeypatch.setenv("STUB_CUDA_ORDINAL", "1")
        with pytest.raises(InputError, match="the image is on GPU 1, the engine on GPU 0; move it there"):
            opened.run_device(described)


def test_mapped_host_memory_is_read_in_place(
    simulation: Simulation, driver: DriverName, stub: Stub, other: Other
) -> None:
    """What a Jetson's camera library gives."""
    array = an_image()
    with other.cuda.host_memory(array.nbytes, mapped=True) as mapped, session(simulation, driver) as opened:
        mapped.array[:] = array.reshape(-1)
        stub.record_calls()
        with opened.run_device(Described(mapped.array.ctypes.data, array.shape[1:], typestr="<u1"))["mask"] as mask:
            assert not [call for call in stub.calls() if "Memcpy" in call]
            np.testing.assert_array_equal(mask.numpy(), simulation.masks(array))


# -- DLPack as a consumer ---------------------------------------------------------------------------------------------


class Maker:
    """Has ``__dlpack__``: numpy's capsule of memory that the stub's device can reach."""

    def __init__(
        self, address: int, array: np.ndarray, *, device: tuple[int, int] = (dlpack.CUDA, 0), old: bool = False
    ) -> None:
        self.memory = dlpack.Memory(self, address, array.shape, array.dtype)
        self.device = device
        self.old = old
        self.asked: dict[str, object] = {}
        self.references = sys.getrefcount(self.memory)

    def has_it_back(self) -> bool:
        """Whether the deleter was called: nobody else holds the memory."""
        return sys.getrefcount(self.memory) == self.references

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **asked: Any) -> object:
        if self.old and "max_version" in asked:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.asked = asked
        self.capsule = dlpack.give(self.memory, *self.device, asked.get("max_version"))
        return self.capsule


@pytest.mark.parametrize("old", [False, True])
def test_the_maker_is_told_our_stream_and_gets_its_tensor_back(
    simulation: Simulation, driver: DriverName, other: Other, old: bool
) -> None:
    array = an_image()
    maker = Maker(other.finished(array), array, old=old)
    with session(simulation, driver) as opened:
        np.testing.assert_array_equal(mask_of(opened, maker), simulation.masks(array))
    assert int(maker.asked["stream"]) > 2, "not one of the default streams"  # type: ignore[call-overload]
    assert maker.asked.get("max_version") == (None if old else (1, 0))
    assert "used_dltensor" in repr(maker.capsule)
    assert maker.has_it_back()


def test_a_maker_that_waits_for_itself_on_our_stream(
    opened: TensorRTSession, simulation: Simulation, driver: DriverName, other: Other
) -> None:
    """What the stream is for: the maker makes it wait for the maker's own."""
    array = an_image()

    class Waiting(Maker):
        def __dlpack__(self, **asked: Any) -> object:
            if driver == "cuda-bindings":
                with other.cuda.event(timing=False) as event, other.cuda.active():
                    event.record(other.stream)
                    other.cuda.driver.wait(other.cuda.driver._api.CUstream(asked["stream"]), event.handle)  # type: ignore[attr-defined]
            else:  # which cannot name a stream it did not make
                other.cuda.synchronize()
            return super().__dlpack__(**asked)

    np.testing.assert_array_equal(mask_of(opened, Waiting(other.image(array), array)), simulation.masks(array))


@pytest.mark.parametrize("device", [(dlpack.CUDA_HOST, 0), (dlpack.CUDA_MANAGED, 0)])
def test_page_locked_and_managed_memory(
    simulation: Simulation, driver: DriverName, other: Other, device: tuple[int, int]
) -> None:
    array = an_image()
    with other.cuda.host_memory(array.nbytes, mapped=True) as mapped, session(simulation, driver) as opened:
        mapped.array[:] = array.reshape(-1)
        maker = Maker(mapped.array.ctypes.data, array, device=device)
        np.testing.assert_array_equal(mask_of(opened, maker), simulation.masks(array))
        assert (maker.asked["stream"] is None) == (device[0] == dlpack.CUDA_HOST), "host memory has no streams"


@pytest.mark.parametrize("device", [(dlpack.CPU, 0), (dlpack.CUDA, 1), (10, 0)])
def test_tensors_elsewhere_are_refused_before_they_are_taken(
    opened: TensorRTSession, other: Other, device: tuple[int, int]
) -> None:
    array = an_image()
    maker = Maker(other.finished(array), array, device=device)
    with pytest.raises(InputError, match=rf"on DLPack device \({device[0]}, {device[1]}\), the engine on GPU 0"):
        opened.run_device(maker)
    assert maker.asked == {}


def test_a_tensor_that_does_not_fit_goes_back(opened: TensorRTSession, other: Other) -> None:
    array = np.zeros((1, 2 * SIDE, SIDE, 3), np.uint8)
    floats = np.zeros((1, SIDE, SIDE, 3), np.float32)
    for wrong, said in [(array, "this engine takes"), (floats, "float32; give uint8")]:
        maker = Maker(other.finished(wrong), wrong)
        with pytest.raises(InputError, match=said):
            opened.run_device(maker)
        assert maker.has_it_back()
    failing = Maker(other.finished(an_image()), an_image())
    failing.memory = None  # type: ignore[assignment]
    failing.__class__ = type("Refusing", (Maker,), {"__dlpack__": _refuse})
    with pytest.raises(InputError, match="cannot be given away as DLPack: not contiguous"):
        opened.run_device(failing)


def _refuse(self: Maker, **asked: object) -> object:
    raise BufferError("not contiguous")


def test_a_tensor_goes_back_when_the_gpu_fails(opened: TensorRTSession, stub: Stub, other: Other) -> None:
    array = an_image()
    maker = Maker(other.finished(array), array)
    stub.fail("kernel", 1, LAUNCH_FAILED)
    with pytest.raises(DeviceError):
        opened.run_device(maker)
    assert maker.has_it_back()


# -- results ----------------------------------------------------------------------------------------------------------


def test_a_result_describes_itself(simulation: Simulation, driver: DriverName, other: Other) -> None:
    array = an_image()
    described = Described(other.finished(array), array.shape)
    with session(simulation, driver) as opened, opened.run_device(described)["mask"] as mask:
        assert mask.__cuda_array_interface__ == {
            "shape": (1, SIDE, SIDE),
            "typestr": "|u1",
            "data": (mask.address, False),
            "version": 3,
            "strides": None,
            "stream": None,
        }
        assert mask.__dlpack_device__() == (dlpack.CUDA, 0)
        # Ours as an image again, by both protocols: what is given can be taken.
        for version in (None, (1, 0)):
            received = dlpack.receive(mask.__dlpack__(stream=1, max_version=version))
            assert (received.address, received.shape, received.dtype) == (mask.address, (1, SIDE, SIDE), np.uint8)
            assert (received.device_type, received.device_index) == (dlpack.CUDA, 0)
            received.release()


def test_a_result_is_copied_to_the_host_on_request(simulation: Simulation, driver: DriverName, other: Other) -> None:
    array = an_image()
    described = Described(other.finished(array), array.shape)
    with session(simulation, driver) as opened, opened.run_device(described)["mask"] as mask:
        if np.lib.NumpyVersion(np.__version__) >= "2.1.0":
            np.testing.assert_array_equal(np.from_dlpack(mask, device="cpu"), simulation.masks(array))
        copy = dlpack.receive(mask.__dlpack__(dl_device=(dlpack.CPU, 0)))
        assert copy.device_type == dlpack.CPU
        copy.release()
        for asked in ({"copy": True}, {"dl_device": (dlpack.CPU, 0), "copy": False}, {"dl_device": (dlpack.CUDA, 1)}):
            with pytest.raises(BufferError, match="in place only"):
                mask.__dlpack__(**asked)  # type: ignore[arg-type]


def test_a_taker_by_dlpack_outlives_the_tensor_and_the_engine(
    simulation: Simulation, driver: DriverName, stub: Stub, other: Other
) -> None:
    array = an_image()
    described = Described(other.finished(array), array.shape)
    with session(simulation, driver) as opened:
        with opened.run_device(described)["mask"] as mask:
            taken = dlpack.receive(mask.__dlpack__(stream=1, max_version=(1, 0)))
        for _ in range(3):  # the memory is not used again while it is taken
            assert (
                opened.run_device(Described(other.finished(an_image()), array.shape))["mask"].address != taken.address
            )
    view = np.ctypeslib.as_array((ctypes.c_uint8 * (SIDE * SIDE)).from_address(taken.address))
    np.testing.assert_array_equal(view.reshape(1, SIDE, SIDE), simulation.masks(array))
    assert stub.live()["retains"] == 2, "the context is kept for it"
    taken.release()
    assert stub.live()["retains"] == 1


def test_results_that_outlive_the_engine_free_the_rest_at_once(
    simulation: Simulation, driver: DriverName, stub: Stub, other: Other
) -> None:
    array = an_image()
    described = Described(other.finished(array), array.shape)
    before = stub.live()
    with session(simulation, driver) as opened:
        first, second = (opened.run_device(described)["mask"] for _ in range(2))
    left = stub.live()
    assert (left["streams"], left.get("events", 0)) == (before["streams"], 0)
    assert left["device memory"] == before["device memory"] + 2
    first.close()
    np.testing.assert_array_equal(second.numpy(), simulation.masks(array))
    del second
    assert stub.live() == before


def reading(other: Other, address: int, stream: Stream | int) -> Callable[[], np.ndarray]:
    """Give a stream the work of copying a mask; returns how to wait for it and see it."""
    host = np.zeros(SIDE * SIDE, np.uint8)
    handle = stream if isinstance(stream, int) else stream.address
    with other.cuda.active():
        copy = other.stub._library.cuMemcpyDtoHAsync_v2
        copy(ctypes.c_void_p(host.ctypes.data), ctypes.c_uint64(address), ctypes.c_size_t(host.nbytes),
             ctypes.c_void_p(handle))  # fmt: skip

    def see() -> np.ndarray:
        with other.cuda.active():
            other.stub._library.cuStreamSynchronize(ctypes.c_void_p(handle))
        return host.reshape(1, SIDE, SIDE)

    return see


@pytest.mark.parametrize("by", ["interface", "dlpack, default stream", "dlpack, own stream", "dlpack, no stream"])
def test_memory_is_written_again_only_when_its_readers_are_done(
    simulation: Simulation, driver: DriverName, stub: Stub, other: Other, by: str
) -> None:
    """A taker enqueues work on the mask, closes it and goes on: the next mask must not get there first."""
    array = an_image()
    own = by in ("dlpack, own stream", "dlpack, no stream")
    stream = other.cuda.stream().address if own else other.blocking_stream()
    with session(simulation, driver) as opened:
        mask = opened.run_device(Described(other.finished(array), array.shape))["mask"]
        address = mask.address
        if by == "interface":
            assert mask.__cuda_array_interface__["data"][0] == address
        else:
            told = {"dlpack, default stream": 1, "dlpack, own stream": stream, "dlpack, no stream": -1}[by]
            dlpack.receive(mask.__dlpack__(stream=told)).release()
        see = reading(other, address, stream)
        mask.close()
        again = opened.run_device(Described(other.finished(an_image()), array.shape))["mask"]
        assert again.address == address
        np.testing.assert_array_equal(see(), simulation.masks(array))
        again.close()
    if not own:
        other.destroy(stream)


def test_memory_that_nobody_else_saw_is_not_waited_for(opened: TensorRTSession, stub: Stub, other: Other) -> None:
    array = an_image()
    described = Described(other.finished(array), array.shape)
    mask_of(opened, described)
    stub.record_calls()
    mask_of(opened, described)
    assert not {"cuEventRecord", "cuStreamWaitEvent", "cuCtxSynchronize"} & set(stub.calls())


def test_spare_memory_is_bounded(opened: TensorRTSession, stub: Stub, other: Other) -> None:
    array = an_image()
    described = Described(other.finished(array), array.shape)
    before = stub.live()["device memory"]
    results = [opened.run_device(described)["mask"] for _ in range(40)]
    assert stub.live()["device memory"] == before + 40
    for result in results:
        result.close()
    assert stub.live()["device memory"] == before + 16


def test_memory_of_a_larger_result_serves_a_smaller_one(stub: Stub, driver: DriverName, other: Other) -> None:
    profile = [(1, 16, 16, 3), (2, SIDE, SIDE, 3), (4, 64, 64, 3)]
    simulation = Simulation(stub, model("n", ("h", "w")), "10.16.1.11", profile)
    with session(simulation, driver, batch=BatchRange(1, 2, 4)) as opened:
        for shape in [(4, 64, 64, 3), (1, 16, 16, 3), (2, 32, 48, 3)]:
            array = RNG.integers(0, 256, shape, np.uint8)
            np.testing.assert_array_equal(
                mask_of(opened, Described(other.finished(array), shape)), simulation.masks(array)
            )
            made = stub.made("device memory")
        assert stub.made("device memory") == made


def test_a_loop_over_one_buffer_becomes_one_cuda_graph(
    simulation: Simulation, driver: DriverName, stub: Stub, other: Other
) -> None:
    """A camera library writes every frame to the same place; closing each mask brings its memory back."""
    if driver == "pycuda":
        pytest.skip("pycuda has no CUDA graphs")
    frame = other.cuda.device_memory(SIDE * SIDE * 3)
    with session(simulation, driver, SessionOptions(cuda_graph=True, contexts=1)) as opened:
        stub.record_calls()
        for _ in range(5):
            array = an_image()
            with other.cuda.active():
                other.stream.copy_to_device(frame.address, array.reshape(-1))
                other.stream.synchronize()
            np.testing.assert_array_equal(
                mask_of(opened, Described(frame.address, array.shape)), simulation.masks(array)
            )
        calls = stub.calls()
        assert calls.count("cuStreamBeginCapture_v2") == 1
        assert calls.count("cuGraphLaunch") == 4
        # At another address the graph is void, and is not launched.
        array = an_image()
        stub.record_calls()
        np.testing.assert_array_equal(
            mask_of(opened, Described(other.finished(array), array.shape)), simulation.masks(array)
        )
        calls = stub.calls()
        assert calls.count("cuGraphExecDestroy") == 1
        assert "cuGraphLaunch" not in calls


def test_nothing_is_allocated_for_images_in_place(opened: TensorRTSession, stub: Stub, other: Other) -> None:
    array = an_image()
    described = Described(other.finished(array), array.shape)
    mask_of(opened, described)
    made = {kind: stub.made(kind) for kind in ("device memory", "host memory", "events")}
    mask_of(opened, described)
    assert {kind: stub.made(kind) for kind in made} == made
