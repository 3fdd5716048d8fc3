"""The CUDA layer on the stub driver. The stub launches no kernel: this proves plumbing, not speed and not results."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from in_threads import in_threads
from stub_cuda import LAUNCH_FAILED, OUT_OF_MEMORY, Stub

from edgeseg.backends.cuda.device import Cuda, DeviceMemory, open_cuda
from edgeseg.backends.cuda.driver import DriverName
from edgeseg.errors import DeviceError

RNG = np.random.default_rng(5)


def random_bytes(n: int) -> np.ndarray:
    return RNG.integers(0, 256, n, np.uint8)


def round_trip(cuda: Cuda, data: np.ndarray) -> np.ndarray:
    with (
        cuda.device_memory(data.nbytes) as memory,
        cuda.host_memory(data.nbytes) as up,
        cuda.host_memory(data.nbytes) as down,
        cuda.stream() as stream,
    ):
        up.array[:] = data
        with cuda.active():
            stream.copy_to_device(memory.address, up.array)
            stream.copy_to_host(down.array, memory.address)
            stream.synchronize()
        return down.array.copy()


def test_device_facts(stub: Stub, driver: DriverName) -> None:
    with open_cuda(driver) as cuda:
        assert cuda.device.name == "Stub (no GPU)"
        assert cuda.device.compute_capability == (8, 7)
        assert cuda.device.cuda_version == "13.0"
        assert not cuda.device.integrated
        assert cuda.device.maps_host_memory
        free, total = cuda.memory_info()
        assert total == 1 << 30
        with cuda.device_memory(1 << 20):
            assert cuda.memory_info() == (free - (1 << 20), total)


def test_transfers_are_byte_exact(stub: Stub, driver: DriverName) -> None:
    with open_cuda(driver) as cuda:
        for size in (1, 3, 4096, 1_000_003):
            data = random_bytes(size)
            np.testing.assert_array_equal(round_trip(cuda, data), data)


def test_copies_wait_for_the_stream(stub: Stub, driver: DriverName) -> None:
    """The stub copies only when synchronized, so forgetting to would be seen."""
    data = random_bytes(100)
    with open_cuda(driver) as cuda, cuda.device_memory(100) as memory, cuda.stream() as stream, cuda.active():
        down = np.zeros(100, np.uint8)
        stream.copy_to_device(memory.address, data)
        stream.copy_to_host(down, memory.address)
        assert not down.any()
        stream.synchronize()
        np.testing.assert_array_equal(down, data)


def test_mapped_memory_is_seen_by_both_sides(stub: Stub, driver: DriverName) -> None:
    with open_cuda(driver) as cuda, cuda.host_memory(64, mapped=True) as mapped, cuda.stream() as stream, cuda.active():
        assert mapped.address is not None
        mapped.array[:] = np.arange(64)
        down = np.zeros(64, np.uint8)
        stream.copy_to_host(down, mapped.address)
        stream.synchronize()
        np.testing.assert_array_equal(down, np.arange(64))


def test_copy_on_device(stub: Stub, driver: DriverName) -> None:
    data = random_bytes(64)
    with open_cuda(driver) as cuda, cuda.device_memory(64) as a, cuda.device_memory(64) as b, cuda.stream() as stream:
        down = np.zeros(64, np.uint8)
        with cuda.active():
            stream.copy_to_device(a.address, data)
            stream.copy_on_device(b.address, a.address, 64)
            stream.copy_to_host(down, b.address)
            stream.synchronize()
        np.testing.assert_array_equal(down, data)


def test_events_order_streams_and_take_time(stub: Stub, driver: DriverName) -> None:
    data = random_bytes(64)
    with open_cuda(driver) as cuda, cuda.device_memory(64) as memory, cuda.stream() as one, cuda.stream() as two:
        with cuda.event() as start, cuda.event() as written, cuda.active():
            start.record(one)
            one.copy_to_device(memory.address, data)
            written.record(one)
            down = np.zeros(64, np.uint8)
            two.wait(written)
            two.copy_to_host(down, memory.address)
            two.synchronize()
            np.testing.assert_array_equal(down, data)
            written.synchronize()
            assert 0 <= written.elapsed_ms(start) < 10_000


def test_waiting_for_somebody_elses_stream(stub: Stub, driver: DriverName) -> None:
    data = random_bytes(64)
    with open_cuda(driver) as cuda, cuda.device_memory(64) as memory, cuda.stream() as mine, cuda.stream() as theirs:
        with cuda.event(timing=False) as event, cuda.active():
            theirs.copy_to_device(memory.address, data)
            mine.wait_for_stream(theirs.address, event)
            down = np.zeros(64, np.uint8)
            mine.copy_to_host(down, memory.address)
            mine.synchronize()
            np.testing.assert_array_equal(down, data)


def test_threads_share_a_device(stub: Stub, driver: DriverName) -> None:
    wrong: list[int] = []

    def work(cuda: Cuda, seed: int) -> None:
        data = np.random.default_rng(seed).integers(0, 256, 50_000, np.uint8)
        for _ in range(20):
            if not np.array_equal(round_trip(cuda, data), data):
                wrong.append(seed)

    with open_cuda(driver) as cuda:
        in_threads(2, partial(work, cuda))
        assert wrong == []
        assert "context pushes" not in stub.live()
        assert cuda.live == 0


def test_pushes_are_popped_also_after_an_error(stub: Stub, driver: DriverName) -> None:
    with open_cuda(driver) as cuda:
        with pytest.raises(KeyError), cuda.active(), cuda.active():
            assert stub.live()["context pushes"] >= 1
            raise KeyError
        assert "context pushes" not in stub.live()


def test_everything_is_freed_once(stub: Stub, driver: DriverName) -> None:
    cuda = open_cuda(driver)
    memory = cuda.device_memory(10)
    memory.close()
    memory.close()
    left: list[DeviceMemory] = [cuda.device_memory(10) for _ in range(3)]
    cuda.stream()
    cuda.event()
    cuda.host_memory(10)
    assert cuda.live == 6
    cuda.close()
    cuda.close()
    left[0].close()
    assert stub.live() == {}
    with pytest.raises(DeviceError, match="closed"):
        cuda.stream()


MAKERS: dict[str, tuple[Callable[[Cuda], object], str]] = {
    "cuMemAlloc_v2": (lambda cuda: cuda.device_memory(3 << 20), "3.0 MiB asked of Stub"),
    "cuMemHostAlloc": (lambda cuda: cuda.host_memory(3 << 20), "3.0 MiB asked of Stub"),
    "cuMemHostGetDevicePointer_v2": (lambda cuda: cuda.host_memory(64, mapped=True), "cuMemHostGetDevicePointer"),
    "cuStreamCreate": (lambda cuda: cuda.stream(), "cuStreamCreate"),
    "cuEventCreate": (lambda cuda: cuda.event(), "cuEventCreate"),
}


@pytest.mark.parametrize("function", MAKERS)
def test_out_of_memory_is_one_clear_line_and_leaks_nothing(stub: Stub, driver: DriverName, function: str) -> None:
    if (driver, function) == ("pycuda", "cuMemAlloc_v2"):
        pytest.skip("pycuda collects garbage and asks a second time; see the test of a full GPU")
    make, said = MAKERS[function]
    with open_cuda(driver) as cuda:
        stub.fail(function, 1, OUT_OF_MEMORY)
        with pytest.raises(DeviceError, match="CUDA_ERROR_OUT_OF_MEMORY.*use a smaller batch") as caught:
            make(cuda)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.code == "CUDA_ERROR_OUT_OF_MEMORY"
        assert cuda.live == 0
        assert set(stub.live()) == {"retains"}


def test_a_full_gpu_says_what_was_asked(stub: Stub, driver: DriverName) -> None:
    with open_cuda(driver) as cuda, pytest.raises(DeviceError, match="cuMemAlloc.*4096.0 MiB asked"):
        cuda.device_memory(4 << 30)


def test_launch_failure_says_restart_and_the_rest_is_still_freed(stub: Stub, driver: DriverName) -> None:
    cuda = open_cuda(driver)
    cuda.device_memory(100)
    stream = cuda.stream()
    cuda.event()
    stub.fail("cuStreamSynchronize", 1, LAUNCH_FAILED, sticky=True)
    with pytest.raises(DeviceError, match="CUDA_ERROR_LAUNCH_FAILED.*restart"):
        with cuda.active():
            stream.synchronize()
    stub.work_again()
    stub.fail("cuMemFree_v2", 1, LAUNCH_FAILED)
    if driver == "pycuda":
        cuda.close()  # pycuda prints what it cannot free, and goes on
    else:
        with pytest.raises(DeviceError, match="cuMemFree failed: CUDA_ERROR_LAUNCH_FAILED"):
            cuda.close()
    assert stub.live() == {}


def test_opening_fails_cleanly(stub: Stub, driver: DriverName) -> None:
    with pytest.raises(DeviceError, match="CUDA_ERROR_INVALID_DEVICE.*no GPU of this number"):
        open_cuda(driver, index=5)
    stub.fail("cuDevicePrimaryCtxRetain", 1, OUT_OF_MEMORY)
    with pytest.raises(DeviceError, match="cuDevicePrimaryCtxRetain failed: CUDA_ERROR_OUT_OF_MEMORY"):
        open_cuda(driver)


def test_graph_captures_in_order_and_launches_again(stub: Stub, driver: DriverName) -> None:
    if driver == "pycuda":
        with open_cuda(driver) as cuda, cuda.stream() as stream:
            with pytest.raises(DeviceError, match="pycuda has no CUDA graphs.*cuda-bindings"):
                stream.recorded(pytest.fail)
        return
    with open_cuda(driver) as cuda, cuda.device_memory(8) as memory, cuda.stream() as stream, cuda.active():
        data, down = random_bytes(8), np.zeros(8, np.uint8)
        stub.record_calls()

        def copies() -> None:
            stream.copy_to_device(memory.address, data)
            stream.copy_to_host(down, memory.address)

        recorded = stream.recorded(copies)
        assert stub.calls() == [
            "cuStreamBeginCapture_v2",
            "cuMemcpyHtoDAsync_v2",
            "cuMemcpyDtoHAsync_v2",
            "cuStreamEndCapture",
            "cuGraphInstantiateWithFlags",
            "cuGraphDestroy",
        ]
        stream.synchronize()
        assert not down.any(), "capturing must not do the work"
        with recorded as graph:
            for _ in range(3):
                data[:] = random_bytes(8)
                graph.launch(stream)
                stream.synchronize()
                np.testing.assert_array_equal(down, data)


def test_a_capture_that_fails_leaves_no_graph_and_a_working_stream(stub: Stub, driver: DriverName) -> None:
    if driver == "pycuda":
        pytest.skip("pycuda has no CUDA graphs")
    with open_cuda(driver) as cuda, cuda.stream() as stream, cuda.active():
        with pytest.raises(DeviceError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
            stream.recorded(stream.synchronize)
        with pytest.raises(KeyError):
            stream.recorded({}.popitem)  # type: ignore[arg-type]
        stub.fail("cuGraphInstantiateWithFlags", 1, OUT_OF_MEMORY)
        with pytest.raises(DeviceError, match="cuGraphInstantiate failed: CUDA_ERROR_OUT_OF_MEMORY"):
            stream.recorded(lambda: None)
        assert not {"graphs", "graph execs"} & set(stub.live())
        stream.synchronize()
