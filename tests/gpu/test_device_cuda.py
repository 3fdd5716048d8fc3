"""edgeseg's CUDA layer on a real driver, without TensorRT: memory, streams, graphs, threads, arrays of PyTorch and CuPy."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
from in_threads import in_threads
from numpy.typing import NDArray

from edgeseg.backends.cuda.arrays import DeviceTensor, device_images
from edgeseg.backends.cuda.device import Cuda, open_cuda
from edgeseg.backends.cuda.result_memory import ResultMemory
from edgeseg.errors import DeviceError, EdgesegError

pytestmark = pytest.mark.gpu

RNG = np.random.default_rng(7)


@pytest.fixture
def cuda() -> Any:
    try:
        opened = open_cuda()
    except EdgesegError as exc:
        pytest.skip(f"needs an NVIDIA GPU: {exc}")
    with opened:
        yield opened
    assert opened.live == 0


def noise(size: int) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, size, np.uint8)


def test_what_the_driver_says(cuda: Cuda, figures: dict[str, Any]) -> None:
    free, total = cuda.memory_info()
    assert 0 < free <= total
    figures.update(dataclasses.asdict(cuda.device), package=cuda.driver.name, graphs=cuda.driver.has_graphs, free=free)


@pytest.mark.parametrize("size", [1, 3, 4096, 1_000_003, 64 << 20])
def test_copies_and_their_times(cuda: Cuda, figures: dict[str, Any], size: int) -> None:
    data = noise(size)
    with (
        cuda.stream() as stream,
        cuda.device_memory(size) as memory,
        cuda.host_memory(size) as up,
        cuda.host_memory(size) as down,
        cuda.active(),
        cuda.event() as start,
        cuda.event() as middle,
        cuda.event() as end,
    ):
        up.array[:] = data
        start.record(stream)
        stream.copy_to_device(memory.address, up.array)
        middle.record(stream)
        stream.copy_to_host(down.array, memory.address)
        end.record(stream)
        stream.synchronize()
        np.testing.assert_array_equal(down.array, data)
        figures.update(up_ms=middle.elapsed_ms(start), down_ms=end.elapsed_ms(middle))


def test_mapped_memory(cuda: Cuda, figures: dict[str, Any]) -> None:
    with (
        cuda.host_memory(4096, mapped=True) as mapped,
        cuda.device_memory(4096) as there,
        cuda.stream() as stream,
        cuda.active(),
    ):
        mapped.array[:] = noise(4096)
        assert mapped.address is not None
        down = np.zeros(4096, np.uint8)
        stream.copy_on_device(there.address, mapped.address, 4096)
        stream.copy_to_host(down, there.address)
        stream.synchronize()
        np.testing.assert_array_equal(down, mapped.array)
        figures["same_address"] = mapped.address == mapped.array.ctypes.data


def test_a_graph_of_copies_and_a_capture_that_breaks(cuda: Cuda, figures: dict[str, Any]) -> None:
    if not cuda.driver.has_graphs:
        pytest.skip(f"{cuda.driver.name} has no CUDA graphs")
    size, times = 1 << 20, []
    with (
        cuda.stream() as stream,
        cuda.device_memory(size) as memory,
        cuda.host_memory(size) as up,
        cuda.host_memory(size) as down,
        cuda.active(),
    ):
        with pytest.raises(KeyError):
            stream.recorded({}.popitem)  # type: ignore[arg-type]
        stream.synchronize()  # the stream works on

        def copies() -> None:
            stream.copy_to_device(memory.address, up.array)
            stream.copy_to_host(down.array, memory.address)

        graph = stream.recorded(copies)
        for _ in range(50):
            up.array[:] = noise(size)
            begun = time.perf_counter()
            graph.launch(stream)
            stream.synchronize()
            times.append((time.perf_counter() - begun) * 1e3)
            np.testing.assert_array_equal(down.array, up.array)
        graph.close()
    figures["median_ms"] = float(np.median(times))


def test_an_unknown_address_and_too_much_memory(cuda: Cuda) -> None:
    assert cuda.locate(np.zeros(8).ctypes.data) is None
    with cuda.device_memory(1024) as memory:
        assert cuda.locate(memory.address) == (memory.address, 0)
    with pytest.raises(DeviceError):
        cuda.device_memory(1 << 50)


def test_eight_threads_copy(cuda: Cuda) -> None:
    wrong: list[str] = []

    def work(seed: int) -> None:
        own = np.random.default_rng(seed)
        try:
            with cuda.stream() as stream, cuda.device_memory(1 << 20) as memory, cuda.active():
                for _ in range(20):
                    data, down = own.integers(0, 256, 1 << 20, np.uint8), np.zeros(1 << 20, np.uint8)
                    stream.copy_to_device(memory.address, data)
                    stream.copy_to_host(down, memory.address)
                    stream.synchronize()
                    if (down != data).any():
                        wrong.append(f"thread {seed}")
        except EdgesegError as exc:
            wrong.append(repr(exc))

    in_threads(8, work)
    assert wrong == []


def test_memory_comes_back_to_the_driver(cuda: Cuda) -> None:
    before = cuda.memory_info()[0]
    for _ in range(20):
        with cuda.device_memory(256 << 20), cuda.stream(), cuda.event():
            pass
    assert before - cuda.memory_info()[0] < 8 << 20


def result(cuda: Cuda, memory: ResultMemory, array: NDArray[np.uint8]) -> DeviceTensor:
    lease = memory.lease(array.nbytes)
    with cuda.stream() as stream, cuda.active():
        stream.copy_to_device(lease.memory.address, array.reshape(-1))
        stream.synchronize()
    return DeviceTensor(cuda, lease, array.shape, array.dtype)


def torch_with_cuda() -> Any:
    torch = pytest.importorskip("torch", reason="PyTorch with CUDA")
    pytorch = pytest.importorskip("edgeseg.backends.pytorch")
    if (reason := pytorch.why_no_cuda()) is not None:
        pytest.skip(reason)
    return torch


def test_results_go_to_pytorch_without_a_copy(cuda: Cuda) -> None:
    torch = torch_with_cuda()
    array = noise(96 * 128).reshape(1, 96, 128)
    memory = ResultMemory(cuda)
    taken = result(cuda, memory, array)
    by_dlpack = torch.from_dlpack(taken)
    by_interface = torch.as_tensor(result(cuda, memory, array), device="cuda")
    assert by_dlpack.data_ptr() == taken.address
    np.testing.assert_array_equal(by_dlpack.cpu().numpy(), array)
    np.testing.assert_array_equal(by_interface.cpu().numpy(), array)
    taken.close()
    again = result(cuda, memory, array + 1)  # the first one's memory is still lent
    np.testing.assert_array_equal(by_dlpack.cpu().numpy(), array)
    again.close()
    del by_dlpack, by_interface
    memory.close()


@pytest.mark.parametrize("protocol", ["__cuda_array_interface__", "__dlpack__"])
def test_images_of_pytorch_are_read_after_they_are_written(cuda: Cuda, protocol: str) -> None:
    torch = torch_with_cuda()
    side = torch.cuda.Stream()
    with cuda.stream() as stream, cuda.event(timing=False) as foreign:
        for number in range(20):
            with torch.cuda.stream(side):
                busy = torch.rand(2048, 2048, device="cuda")
                for _ in range(5):
                    busy = busy @ busy / 2048
                image = torch.full((64, 64, 3), number, dtype=torch.uint8, device="cuda")
                names = (protocol,) if protocol.startswith("__cuda") else (protocol, "__dlpack_device__")
                given = type("Given", (), {name: getattr(image, name) for name in names})()
                with cuda.active():
                    images = device_images(given, cuda, stream, np.dtype(np.uint8))
            down = np.zeros(64 * 64 * 3, np.uint8)
            with cuda.active():
                for writer in (*images.streams, *(() if protocol == "__dlpack__" else (side.cuda_stream,))):
                    stream.wait_for_stream(writer, foreign)
                stream.copy_to_host(down, images.address)
                stream.synchronize()
            images.release()
            assert (down == number).all(), np.unique(down)


def test_cupy_both_ways(cuda: Cuda) -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy")
    array = noise(96 * 128).reshape(1, 96, 128)
    with cuda.stream() as stream, cuda.event(timing=False) as foreign:
        memory = ResultMemory(cuda)
        taken = result(cuda, memory, array)
        np.testing.assert_array_equal(cupy.asnumpy(cupy.asarray(taken)), array)
        np.testing.assert_array_equal(cupy.asnumpy(cupy.from_dlpack(taken)), array)
        image = cupy.asarray(noise(64 * 64 * 3).reshape(64, 64, 3))
        down = np.zeros(64 * 64 * 3, np.uint8)
        with cuda.active():
            images = device_images(image, cuda, stream, down.dtype)
            for writer in images.streams:
                stream.wait_for_stream(writer, foreign)
            stream.copy_to_host(down, images.address)
            stream.synchronize()
        images.release()
        np.testing.assert_array_equal(down.reshape(64, 64, 3), cupy.asnumpy(image))
        taken.close()
        memory.close()
