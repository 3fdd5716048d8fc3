"""TensorRTSession on the stub driver with recorded TensorRT modules.

The engine's work is done by ONNX Runtime on the stub's memory, when the stream is synchronized. So the masks show that
the right bytes are in the right place at the right time, and nothing about TensorRT's arithmetic or speed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx
import pytest
from described import Described
from recorded_tensorrt import VERSIONS
from simulated import SIDE, Simulation, images, model, session, spec
from stub_cuda import LAUNCH_FAILED, OUT_OF_MEMORY, Stub

from edgeseg.backends.base import DeviceSession, PipelinedSession, TimedSession
from edgeseg.backends.cuda.device import DriverName, open_cuda
from edgeseg.backends.tensorrt.options import SessionOptions
from edgeseg.backends.tensorrt.session import TensorRTSession
from edgeseg.errors import ArtifactError, DeviceError, EdgesegError, InputError
from edgeseg.spec import BatchRange, InputDtype, OutputSpec

RNG = np.random.default_rng(11)
DYNAMIC = [(1, 16, 16, 3), (2, SIDE, SIDE, 3), (4, 64, 64, 3)]


@pytest.fixture(params=["copy", "mapped"])
def memory(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_oracle_tells_images_apart(simulation: Simulation) -> None:
    one, two = simulation.masks(images()), simulation.masks(images())
    assert len(np.unique(one)) > 1
    assert (one != two).any()


@pytest.mark.parametrize("version", VERSIONS)
def test_masks_are_exact_under_every_version(stub: Stub, driver: DriverName, version: str, memory: str) -> None:
    simulation = Simulation(stub, model(), version)
    with session(simulation, driver, SessionOptions(host_memory=memory)) as opened:  # type: ignore[arg-type]
        for _ in range(3):
            image = images()
            outputs = opened.run(image)
            assert outputs["mask"].dtype == np.uint8
            np.testing.assert_array_equal(outputs["mask"], simulation.masks(image))
    assert "IExecutionContext.execute_async_v3" in simulation.recorder.names


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_16_bit_and_float_images_reach_the_engine_as_float32(
    stub: Stub, driver: DriverName, memory: str, dtype: InputDtype
) -> None:
    proto = model()
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    simulation = Simulation(stub, proto)
    contract = replace(spec(), input=replace(spec().input, dtype=dtype))
    wide = [RNG.integers(0, 65536, (1, SIDE, SIDE, 3)).astype(dtype) for _ in range(5)]
    wide[0][0, 0, 0] = 65535
    options = SessionOptions(host_memory=memory)  # type: ignore[arg-type]
    with TensorRTSession(simulation.trt, simulation.engine, contract, open_cuda(driver), options) as opened:
        expected = [simulation.masks(image.astype(np.float32)) for image in wide]
        np.testing.assert_array_equal([opened.run(image)["mask"] for image in wide], expected)
        np.testing.assert_array_equal([result["mask"] for result in opened.run_many(wide)], expected)
        for other in (np.uint8, np.float32 if dtype == "uint16" else np.uint16):
            with pytest.raises(InputError, match=f"this engine takes {dtype}"):
                opened.run(wide[0].astype(other))
        # In place on the device the engine's own dtype; at an odd address it is copied whole.
        image = wide[1].astype(np.float32)
        held = opened._cuda.device_memory(image.nbytes + 16)
        with opened._cuda.stream() as stream, opened._cuda.active():
            stream.copy_to_device(held.address + 16, image.reshape(-1).view(np.uint8))
            stream.synchronize()
        with opened.run_device(Described(held.address + 16, image.shape, typestr="<f4"))["mask"] as mask:
            np.testing.assert_array_equal(mask.numpy(), expected[1])
        held.close()
    uint8 = Simulation(stub, model())
    with (
        open_cuda(driver) as cuda,
        pytest.raises(ArtifactError, match="is image uint8 .*, its manifest says image float32"),
    ):
        TensorRTSession(uint8.trt, uint8.engine, contract, cuda, options)


@pytest.mark.parametrize("version", VERSIONS)
def test_dynamic_shapes(stub: Stub, driver: DriverName, version: str, memory: str) -> None:
    simulation = Simulation(stub, model("n", ("h", "w")), version, DYNAMIC)
    options = SessionOptions(host_memory=memory)  # type: ignore[arg-type]
    with session(simulation, driver, options, BatchRange(1, 2, 4)) as opened:
        for shape in [(1, 32, 32), (4, 64, 64), (2, 16, 48), (2, 16, 48), (1, 32, 32)]:
            image = images(*shape)
            np.testing.assert_array_equal(opened.run(image)["mask"], simulation.masks(image))
        with pytest.raises(
            InputError, match=r"uint8 \(5, 32, 32, 3\), this engine takes uint8 \(1\.\.4, 16\.\.64, 16\.\.64, 3\)"
        ):
            opened.run(images(5))
    shapes = [call.arguments["shape"] for call in simulation.recorder.of("IExecutionContext.set_input_shape")]
    assert shapes == [(1, 32, 32, 3), (4, 64, 64, 3), (2, 16, 48, 3), (1, 32, 32, 3)], "set once for each change"


def test_results_belong_to_the_caller(simulation: Simulation, driver: DriverName) -> None:
    with session(simulation, driver) as opened:
        first_image = images()
        first = opened.run(first_image)["mask"]
        opened.run(images())
        np.testing.assert_array_equal(first, simulation.masks(first_image))
    np.testing.assert_array_equal(first, simulation.masks(first_image))


def test_several_outputs(stub: Stub, driver: DriverName) -> None:
    simulation = Simulation(stub, model(confidence=True))
    with session(simulation, driver, output=OutputSpec(confidence=True)) as opened:
        image = images()
        outputs = opened.run(image)
        mask, confidence = simulation.reference.run(["mask", "confidence"], {"image": image})
        np.testing.assert_array_equal(outputs["mask"], mask)
        np.testing.assert_array_equal(outputs["confidence"], confidence)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (OutputSpec(confidence=True), r"outputs is mask uint8 .* manifest says mask uint8 .*, confidence float32"),
        (OutputSpec("logits"), r"outputs is mask uint8 .* manifest says logits float32 \(1, \d+, 32, 32\)"),
    ],
)
def test_an_engine_of_another_contract_is_refused(
    stub: Stub, driver: DriverName, output: OutputSpec, words: str
) -> None:
    with pytest.raises(ArtifactError, match=words):
        session(Simulation(stub, model()), driver, output=output)


def test_stage_times(simulation: Simulation, driver: DriverName) -> None:
    with session(simulation, driver) as opened:
        assert isinstance(opened, TimedSession)
        assert isinstance(opened, PipelinedSession)
        assert isinstance(opened, DeviceSession)
        image = images()
        outputs, times = opened.run_timed(image)
        np.testing.assert_array_equal(outputs["mask"], simulation.masks(image))
        assert times.h2d_ms is not None
        assert times.d2h_ms is not None
        assert min(times.h2d_ms, times.d2h_ms, times.enqueue_ms) >= 0
        assert times.compute_ms > 0
    with session(simulation, driver, SessionOptions(host_memory="mapped")) as opened:
        times = opened.run_timed(images())[1]
        assert times.h2d_ms is None
        assert times.d2h_ms is None


@pytest.mark.parametrize("version", VERSIONS)
def test_layer_times_come_from_a_context_nobody_else_gets(stub: Stub, driver: DriverName, version: str) -> None:
    simulation = Simulation(stub, model(), version)
    with session(simulation, driver, SessionOptions(contexts=1, cuda_graph=driver == "cuda-bindings")) as opened:
        for _ in range(3):
            opened.run(images())
        reports = opened.layer_times(runs=2)
        assert [name for name, _ in reports] == simulation.layers * 2, "the first run is not counted"
        assert reports[1] == (simulation.layers[1], 0.5)
        contexts = len(simulation.recorder.of("ICudaEngine.create_execution_context"))
        image = images()
        np.testing.assert_array_equal(opened.run(image)["mask"], simulation.masks(image))
        assert len(simulation.recorder.of("ICudaEngine.create_execution_context")) == contexts + 1


def test_mapped_memory_copies_nothing_and_is_the_choice_on_integrated_gpus(
    simulation: Simulation, stub: Stub, driver: DriverName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_CUDA_INTEGRATED", "1")
    with session(simulation, driver) as opened:
        opened.run(images())
        assert "device memory" not in stub.live()
        stub.record_calls()
        opened.run(images())
        assert not [call for call in stub.calls() if "Memcpy" in call]


def test_many_batches_overlap_and_stay_in_order(simulation: Simulation, stub: Stub, opened: TensorRTSession) -> None:
    batches = [images() for _ in range(7)]
    stub.record_calls()
    outputs = list(opened.run_many(iter(batches)))
    calls = [call for call in stub.calls() if call in ("cuMemcpyHtoDAsync_v2", "cuStreamSynchronize")]
    for batch, result in zip(batches, outputs, strict=True):
        np.testing.assert_array_equal(result["mask"], simulation.masks(batch))
    # The second batch is on its way before the first is waited for.
    assert calls[:3] == ["cuMemcpyHtoDAsync_v2", "cuMemcpyHtoDAsync_v2", "cuStreamSynchronize"]


@pytest.mark.parametrize("contexts", [1, 2, 3])
def test_many_batches_leave_room_for_others_and_can_be_broken_off(
    simulation: Simulation, driver: DriverName, contexts: int
) -> None:
    with session(simulation, driver, SessionOptions(contexts=contexts)) as opened:
        for _ in opened.run_many(images() for _ in range(4)):
            image = images()  # would wait for ever if the iterator held every context here
            np.testing.assert_array_equal(opened.run(image)["mask"], simulation.masks(image))
        iterator = opened.run_many(images() for _ in range(4))
        next(iterator)
        iterator.close()  # type: ignore[attr-defined]
        assert opened.run(images())["mask"].shape == (1, SIDE, SIDE)
        wrong = iter([images(), images(), images(2)])
        results = opened.run_many(wrong)
        assert next(results)
        assert next(results)
        with pytest.raises(InputError, match="this engine takes"):
            next(results)


@pytest.mark.filterwarnings("ignore:edgeseg. no CUDA graph:RuntimeWarning")
@pytest.mark.parametrize("graph", [False, True])
def test_eight_threads_and_nothing_is_left(stub: Stub, driver: DriverName, memory: str, graph: bool) -> None:
    """The soak: threads, a bounded number of contexts, failures in between, and every count back to zero."""
    simulation = Simulation(stub, model("n", ("h", "w")), "11.4.0.106", DYNAMIC)
    graphs = stub.made("graph execs")
    wrong: list[str] = []

    def work(opened: TensorRTSession, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for turn in range(25):
            # Few shapes where graphs are wanted: only what repeats becomes one.
            side, most = (8 * int(rng.integers(2, 8)), 4) if not graph else (16, 1)
            image = images(int(rng.integers(1, most + 1)), side, side, seed * 1000 + turn)
            try:
                if turn % 5 == 4:
                    mask = next(iter(opened.run_many([image])))["mask"]
                elif turn % 5 == 3:
                    there = OnDevice(driver, image)
                    try:
                        with opened.run_device(there)["mask"] as result:
                            mask = result.numpy()
                    finally:
                        there.cuda.close()
                else:
                    mask = opened.run(image)["mask"]
            except DeviceError as exc:
                if "CUDA_ERROR_OUT_OF_MEMORY" not in str(exc) and "refuses to run" not in str(exc):
                    wrong.append(repr(exc))
                failed.append(seed)
            else:
                if not np.array_equal(mask, simulation.masks(image)):
                    wrong.append(f"thread {seed}, turn {turn}")

    failed: list[int] = []
    options = SessionOptions(contexts=3, host_memory=memory, cuda_graph=graph)  # type: ignore[arg-type]
    with session(simulation, driver, options, BatchRange(1, 2, 4)) as opened:
        threads = [threading.Thread(target=work, args=(opened, seed)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for k in (3, 5, 9):
            stub.fail("cuMemHostAlloc", k, OUT_OF_MEMORY)
            threading.Event().wait(0.02)
            stub.fail("kernel", k, LAUNCH_FAILED)
            threading.Event().wait(0.02)
        for thread in threads:
            thread.join()
        assert wrong == []
        assert stub.live()["streams"] <= 3
        assert "context pushes" not in stub.live()
    assert stub.made("streams") >= 3
    assert stub.live() == {}
    assert (stub.made("graph execs") > graphs) == (graph and driver == "cuda-bindings")


FAILING = [
    "cuMemAlloc_v2",
    "cuMemHostAlloc",
    "cuStreamCreate",
    "cuEventCreate",
    "cuMemcpyHtoDAsync_v2",
    "kernel",
    "cuMemcpyDtoHAsync_v2",
    "cuStreamSynchronize",
]


@pytest.mark.parametrize("function", FAILING)
@pytest.mark.parametrize("code", [OUT_OF_MEMORY, LAUNCH_FAILED])
def test_a_failure_half_way_is_told_frees_everything_and_is_not_repeated(
    simulation: Simulation, stub: Stub, driver: DriverName, function: str, code: int
) -> None:
    """Each call fails in turn, from loading to the last copy, until one run goes through without a failure."""
    image = images()
    told = 0
    for k in range(1, 30):
        stub.fail(function, k, code)
        try:
            with session(simulation, driver) as opened:
                try:
                    opened.run(image)
                except EdgesegError:
                    # The same session again: what failed must not have broken it.
                    np.testing.assert_array_equal(opened.run(image)["mask"], simulation.masks(image))
                    raise
        except DeviceError as exc:
            told += 1
            assert "\n" not in str(exc)
            assert "CUDA_ERROR" in str(exc) or "refuses to run" in str(exc)
        else:
            break
        assert stub.live() == {}
    pycuda_asks_twice = driver == "pycuda" and function == "cuMemAlloc_v2"
    assert told == k - 1 >= (0 if pycuda_asks_twice else 1)


def test_a_lost_gpu_says_so_and_closing_says_nothing_else(
    simulation: Simulation, stub: Stub, driver: DriverName
) -> None:
    opened = session(simulation, driver)
    stub.fail("cuStreamSynchronize", 1, LAUNCH_FAILED, sticky=True)
    with pytest.raises(DeviceError, match="CUDA_ERROR_LAUNCH_FAILED.*restart"):
        opened.run(images())
    stub.work_again()
    opened.close()
    opened.close()
    with pytest.raises(InputError, match="closed"):
        opened.run(images())


def test_tensorrt_refusing(simulation: Simulation, driver: DriverName) -> None:
    with session(simulation, driver) as opened:
        simulation.refuse = 1
        with pytest.raises(DeviceError, match="refuses to run the engine"):
            opened.run(images())
        image = images()
        np.testing.assert_array_equal(opened.run(image)["mask"], simulation.masks(image))
    simulation.recorder.behaviour["ICudaEngine.create_execution_context"] = lambda engine, **_: None
    with pytest.raises(DeviceError, match="execution context with .* MiB of GPU memory free"):
        session(simulation, driver)


def test_what_the_engine_does_not_take(opened: TensorRTSession, stub: Stub) -> None:
    with pytest.raises(InputError, match=r"images are float32 .*takes uint8 \(1, 32, 32, 3\)"):
        opened.run(images().astype(np.float32))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="this engine takes"):
        opened.run(images(1, 64, 64))
    assert stub.made("streams") >= 1


def test_closing_while_a_result_is_pending(simulation: Simulation, stub: Stub, driver: DriverName) -> None:
    opened = session(simulation, driver)
    iterator = opened.run_many(images() for _ in range(4))
    next(iterator)
    opened.close()
    assert stub.live()["streams"] == 1, "the batch in flight is still there"
    with pytest.raises(InputError, match="closed"):
        next(iterator)


# -- CUDA graphs ------------------------------------------------------------------------------------------------------


def test_cuda_graph_is_recorded_after_the_first_run_of_a_shape(stub: Stub, driver: DriverName) -> None:
    if driver == "pycuda":
        simulation = Simulation(stub, model())
        with pytest.warns(RuntimeWarning, match="pycuda has none.*cuda-bindings"):
            opened = session(simulation, driver, SessionOptions(cuda_graph=True))
        with opened:
            image = images()
            np.testing.assert_array_equal(opened.run(image)["mask"], simulation.masks(image))
        return
    simulation = Simulation(stub, model("n", ("h", "w")), "10.16.1.11", DYNAMIC)
    with session(simulation, driver, SessionOptions(cuda_graph=True), BatchRange(1, 2, 4)) as opened:
        sequence = [1, 1, 1, 1, 2, 2, 2]
        stub.record_calls()
        for n in sequence:
            image = images(n)
            np.testing.assert_array_equal(opened.run(image)["mask"], simulation.masks(image))
        calls = stub.calls()
        assert calls.count("cuStreamBeginCapture_v2") == 2, "once a shape"
        assert calls.count("cuGraphLaunch") == 5, "all but the first run of each shape"
        assert simulation.executed == 4, "one eager run and one recording a shape"
        assert stub.live()["graph execs"] == 1


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("cuStreamBeginCapture_v2", "cuStreamBeginCapture failed: CUDA_ERROR_OUT_OF_MEMORY"),
        ("kernel", "TensorRT refuses to run the engine"),
        ("cuStreamEndCapture", "cuStreamEndCapture failed"),
        ("cuGraphInstantiateWithFlags", "cuGraphInstantiate failed"),
        ("cuGraphDestroy", "cuGraphDestroy failed"),
    ],
)
def test_a_graph_that_cannot_be_recorded_is_said_and_done_without(
    stub: Stub, driver: DriverName, function: str, said: str
) -> None:
    if driver == "pycuda":
        pytest.skip("pycuda has no CUDA graphs")
    simulation = Simulation(stub, model())
    with session(simulation, driver, SessionOptions(cuda_graph=True)) as opened:
        opened.run(images())
        stub.fail(function, 1, OUT_OF_MEMORY)
        image = images()
        with pytest.warns(RuntimeWarning, match=f"no CUDA graph, every inference is enqueued anew: {said}") as warned:
            outputs = opened.run(image)
        np.testing.assert_array_equal(outputs["mask"], simulation.masks(image))
        stub.record_calls()
        np.testing.assert_array_equal(opened.run(image)["mask"], simulation.masks(image))
        assert "cuStreamBeginCapture_v2" not in stub.calls(), "it is not tried again"
        assert len(warned) == 1
        assert not {"graphs", "graph execs"} & set(stub.live())


# -- arrays on the device ---------------------------------------------------------------------------------------------


class OnDevice(Described):
    """An array of another library in the stub's device memory, at an offset, written by a stream of its own."""

    def __init__(self, driver: DriverName, array: np.ndarray, offset: int = 0) -> None:
        self.cuda = open_cuda(driver)
        address = self.cuda.device_memory(array.nbytes + offset).address + offset
        self.array, stream = np.ascontiguousarray(array), self.cuda.stream()
        with self.cuda.active():
            stream.copy_to_device(address, self.array.reshape(-1).view(np.uint8))
        super().__init__(address, array.shape, typestr=array.dtype.str, stream=stream.address)


@pytest.fixture
def on_device(driver: DriverName) -> Iterator[list[OnDevice]]:
    made: list[OnDevice] = []
    yield made
    for each in made:
        each.cuda.close()


@pytest.mark.parametrize("offset", [0, 64])
def test_an_array_on_the_device_is_read_in_place(
    opened: TensorRTSession,
    simulation: Simulation,
    stub: Stub,
    driver: DriverName,
    on_device: list[OnDevice],
    offset: int,
) -> None:
    image = images()
    on_device.append(OnDevice(driver, image[0], offset))
    stub.record_calls()
    outputs = opened.run_device(on_device[0])
    copies = [call for call in stub.calls() if "Memcpy" in call]
    # TensorRT wants addresses in multiples of 256 bytes; others are copied, on the device.
    wanted = ["cuMemcpyDtoDAsync_v2"] if offset else []
    assert copies in (wanted, ["cuMemcpyHtoDAsync_v2", *wanted])  # the writer's own copy may be deferred till then
    with outputs["mask"] as mask:
        np.testing.assert_array_equal(mask.numpy(), simulation.masks(image))
        assert mask.__cuda_array_interface__["shape"] == (1, SIDE, SIDE)
        assert mask.__cuda_array_interface__["data"][0] == mask.address
    with pytest.raises(InputError, match="closed"):
        mask.numpy()
    # Host images afterwards use the lane's own buffers again.
    np.testing.assert_array_equal(opened.run(image)["mask"], simulation.masks(image))


def test_device_arrays_and_cuda_graphs_do_not_disturb_each_other(
    stub: Stub, driver: DriverName, on_device: list[OnDevice]
) -> None:
    if driver == "pycuda":
        pytest.skip("pycuda has no CUDA graphs")
    simulation = Simulation(stub, model())
    on_device.append(OnDevice(driver, images()))
    wanted = simulation.masks(on_device[0].array)
    with session(simulation, driver, SessionOptions(contexts=1, cuda_graph=True)) as opened:
        for _ in range(4):
            image = images()
            np.testing.assert_array_equal(opened.run(image)["mask"], simulation.masks(image))
            with opened.run_device(on_device[0])["mask"] as mask:
                np.testing.assert_array_equal(mask.numpy(), wanted)


def test_arrays_that_do_not_fit(
    opened: TensorRTSession, stub: Stub, driver: DriverName, on_device: list[OnDevice]
) -> None:
    on_device += [OnDevice(driver, images(1, 64, 64)), OnDevice(driver, images()[..., :2].astype(np.float32))]
    streams = stub.made("streams")
    for image, said in [
        (on_device[0], "this engine takes"),
        (on_device[1], "float32; give uint8"),
        (images(), "on DLPack device"),
        ([1, 2], "list.*__cuda_array_interface__"),
    ]:
        with pytest.raises(InputError, match=said):
            opened.run_device(image)
    assert stub.made("streams") == streams, "a wrong image costs no context"
