"""What a process can do to a session on the stub driver: contexts of its own, forks, Ctrl-C, forgetting to close, and a
driver that refuses any call at any time."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from described import Described
from simulated import SIDE, Simulation, an_image, session, spec
from stub_cuda import LAUNCH_FAILED, Stub

from edgeseg.backends.cuda.device import open_cuda
from edgeseg.backends.cuda.driver import DriverName
from edgeseg.backends.tensorrt.options import SessionOptions
from edgeseg.errors import DeviceError, EdgesegError, InputError
from edgeseg.runtime.segmenter import Segmenter

# -- how much is asked of the driver ----------------------------------------------------------------------------------

STEADY = {
    "copy": ["cuMemcpyHtoDAsync_v2", "kernel", "cuMemcpyDtoHAsync_v2", "cuStreamSynchronize"],
    "mapped": ["kernel", "cuStreamSynchronize"],
}


@pytest.mark.parametrize("memory", STEADY)
@pytest.mark.parametrize("graph", [False, True])
def test_calls_of_one_inference(
    simulation: Simulation, driver: DriverName, stub: Stub, memory: str, graph: bool
) -> None:
    """Nothing is made, set or asked in a steady state: one push, the work, one wait, one pop."""
    if graph and driver == "pycuda":
        pytest.skip("pycuda has no CUDA graphs")
    options = SessionOptions(host_memory=memory, cuda_graph=graph)  # type: ignore[arg-type]
    with Segmenter(session(simulation, driver, options), spec()) as segmenter:
        image = an_image()[0]
        for _ in range(3):
            segmenter(image)
        asked = len(simulation.recorder.calls)
        stub.record_calls()
        segmenter(image)
        # pycuda asks which context is current before and after.
        calls = [call for call in stub.calls() if call != "cuCtxGetCurrent"]
        work = STEADY[memory]
        if graph:
            work = ["cuGraphLaunch" if call == "kernel" else call for call in work]
        assert calls == ["cuCtxPushCurrent_v2", *work, "cuCtxPopCurrent_v2"]
        made = [call.name for call in simulation.recorder.calls[asked:]]
        assert made == ([] if graph else ["IExecutionContext.execute_async_v3"])


def test_calls_of_a_stream_of_images(simulation: Simulation, driver: DriverName, stub: Stub) -> None:
    """Each image costs a push and a pop for giving it, and again for taking its mask; nothing else."""
    images = [an_image()[0] for _ in range(6)]
    with Segmenter(session(simulation, driver, SessionOptions(host_memory="copy")), spec()) as segmenter:
        list(segmenter.many(images))
        stub.record_calls()
        masks = list(segmenter.many(images))
        counted = Counter(call for call in stub.calls() if call != "cuCtxGetCurrent")
        assert counted == {
            **dict.fromkeys(STEADY["copy"], 6),
            "cuCtxPushCurrent_v2": 12,
            "cuCtxPopCurrent_v2": 12,
        }
    np.testing.assert_array_equal(np.stack(masks), np.concatenate([simulation.masks(i[None]) for i in images]))


# -- contexts of the application --------------------------------------------------------------------------------------


def everything(simulation: Simulation, driver: DriverName) -> None:
    """Load, run in every way, close."""
    image = an_image()
    with session(simulation, driver) as opened:
        np.testing.assert_array_equal(opened.run(image)["mask"], simulation.masks(image))
        opened.run_timed(image)
        list(opened.run_many([image] * 3))
        with pytest.raises(InputError):
            opened.run(np.zeros((1, 8, 8, 3), np.uint8))
        with open_cuda(driver) as cuda, cuda.device_memory(image.nbytes) as memory, cuda.stream() as stream:
            with cuda.active():
                stream.copy_to_device(memory.address, image.reshape(-1))
                stream.synchronize()
            with opened.run_device(Described(memory.address, image.shape))["mask"] as mask:
                np.testing.assert_array_equal(mask.numpy(), simulation.masks(image))


def test_the_applications_context_is_as_it_was(simulation: Simulation, driver: DriverName, stub: Stub) -> None:
    stub.push_application_context(1)
    try:
        everything(simulation, driver)
        assert stub.contexts() == [1]
    finally:
        stub.pop_application_context()


def test_a_context_of_pycuda_below_one_of_another_library(
    simulation: Simulation, driver: DriverName, stub: Stub
) -> None:
    """pycuda takes the current context for its own when it switches; the other library's must come back."""
    if driver != "pycuda":
        pytest.skip("other packages keep to the driver's own stack")
    import pycuda.driver

    pycuda.driver.init()
    theirs = pycuda.driver.Device(0).retain_primary_context()
    theirs.push()
    stub.push_application_context(2)
    try:
        before = stub.contexts()
        assert before == [0, 2]
        everything(simulation, driver)
        assert stub.contexts() == before
    finally:
        stub.pop_application_context()
        pycuda.driver.Context.pop()
        theirs.push()
        theirs.detach()
        stub._library.cuCtxPopCurrent_v2(None)


# -- any call may fail ------------------------------------------------------------------------------------------------


def load_run_and_stream(simulation: Simulation, driver: DriverName, memory: str) -> None:
    """Everything that takes part in inference, with a second lane and, where there are any, CUDA graphs."""
    image = an_image()
    wanted = simulation.masks(image)
    options = SessionOptions(host_memory=memory, cuda_graph=driver == "cuda-bindings")  # type: ignore[arg-type]
    with session(simulation, driver, options) as opened:
        for _ in range(3):
            np.testing.assert_array_equal(opened.run(image)["mask"], wanted)
        for outputs in opened.run_many([image] * 4):
            np.testing.assert_array_equal(outputs["mask"], wanted)
        opened.run_timed(image)
        with open_cuda(driver) as cuda, cuda.device_memory(image.nbytes + 256) as frame, cuda.stream() as stream:
            for offset in (0, 64):
                with cuda.active():
                    stream.copy_to_device(frame.address + offset, image.reshape(-1))
                    stream.synchronize()
                there = Described(frame.address + offset, image.shape, stream=stream.address)
                with opened.run_device(there)["mask"] as mask:
                    np.testing.assert_array_equal(mask.numpy(), wanted)
                    mask.__dlpack__(stream=stream.address)


SILENT = {
    # Of recording a graph, which is noted and done without; the "kernel" is one of those being recorded.
    "cuda-bindings": {
        "cuStreamBeginCapture_v2",
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
        "cuGraphDestroy",
        "kernel",
    },
    # Of freeing: pycuda prints what it cannot free, and goes on. The push is the one before that.
    "pycuda": {
        "cuCtxPushCurrent_v2",
        "cuDevicePrimaryCtxRelease_v2",
        "cuEventDestroy_v2",
        "cuMemFree_v2",
        "cuMemFreeHost",
        "cuStreamDestroy_v2",
    },
}
"""Functions that may be refused without an error for the caller."""


@pytest.mark.parametrize("memory", ["copy", "mapped"])
@pytest.mark.filterwarnings("ignore:edgeseg. no CUDA graph:RuntimeWarning")
def test_every_call_of_every_function_fails_in_turn(
    simulation: Simulation, driver: DriverName, stub: Stub, memory: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever is refused, and when: one clear error or none, right masks or none, and nothing left."""
    stub.record_calls()
    load_run_and_stream(simulation, driver, memory)
    counted = Counter(stub.calls())
    gc.collect()
    assert stub.live() == {}
    assert len(counted) >= 20
    if driver == "pycuda":
        # It has a stack of contexts of its own, which no longer fits the driver's when the driver refuses to pop. The
        # driver never does, unless there is nothing to pop.
        del counted["cuCtxPopCurrent_v2"]
    silent: set[str] = set()
    for function, times in counted.items():
        for k in {1, 2, 3, times // 2, times} & set(range(1, times + 1)):
            stub.fail(function, k, LAUNCH_FAILED)
            try:
                load_run_and_stream(simulation, driver, memory)
            except EdgesegError as exc:
                assert isinstance(exc, (DeviceError, InputError)), f"{function} {k}: {exc!r}"
                assert "\n" not in str(exc)
                assert "CUDA_ERROR_LAUNCH_FAILED" in str(exc) or "refuses to run" in str(exc), f"{function} {k}: {exc}"
            else:
                silent.add(function)
            stub.work_again()
            gc.collect()
            left = stub.live()
            # A pop that the driver refuses is not repeated: nobody knows whether it happened. The stub's did.
            assert left == {}, f"{function} {k}: {left}"
            assert stub.contexts() == []
    assert silent <= SILENT[driver], "refused, and nobody was told"


# -- forgetting to close, and closing too early -----------------------------------------------------------------------


def test_a_session_that_is_dropped_closes_and_warns(simulation: Simulation, driver: DriverName, stub: Stub) -> None:
    opened = session(simulation, driver)
    opened.run(an_image())
    kept = [opened]
    del opened
    with pytest.warns(ResourceWarning, match=r"TensorRTSession .*was not closed"):
        kept.clear()
    assert stub.live() == {}


def test_a_session_that_is_closed_says_nothing_when_dropped(simulation: Simulation, driver: DriverName) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session(simulation, driver).close()
        gc.collect()


def test_a_program_that_ends_without_closing(driver: DriverName) -> None:
    """Everything is freed while the driver is there, with a stream of results still open, and nothing is printed."""
    code = f"""
import atexit, os, sys
sys.setdlopenflags(os.RTLD_LAZY)
from stub_cuda import Stub
stub = Stub()
atexit.register(lambda: print(stub.live(), stub.violations()))  # called after those registered later
import numpy as np
from simulated import SIDE, Simulation, model, spec
from edgeseg.backends.cuda.device import open_cuda
from edgeseg.backends.tensorrt.session import TensorRTSession
simulation = Simulation(stub, model())
opened = TensorRTSession(simulation.trt, simulation.engine, spec(), open_cuda({driver!r}))
results = opened.run_many([np.zeros((1, SIDE, SIDE, 3), np.uint8)] * 4)
print(next(results)["mask"].shape)
results.close()
"""
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert (done.returncode, done.stdout.split("\n")) == (0, [f"(1, {SIDE}, {SIDE})", "{} 0", ""]), done.stderr
    assert done.stderr == ""


def test_close_while_calls_are_in_flight(simulation: Simulation, driver: DriverName, stub: Stub) -> None:
    """Those that run end well, those that wait are told, and the last one out frees everything."""
    entered, go_on = threading.Event(), threading.Event()
    opened = session(simulation, driver, SessionOptions(contexts=1))
    told: list[str] = []
    masks: list[np.ndarray] = []
    image = an_image()

    def run() -> None:
        try:
            masks.append(opened.run(image)["mask"])
        except InputError as exc:
            told.append(str(exc))

    inner = simulation.recorder.behaviour["IExecutionContext.execute_async_v3"]

    def slow(context: object, stream_handle: int) -> object:
        entered.set()
        assert go_on.wait(10)
        return inner(context, stream_handle)

    simulation.recorder.behaviour["IExecutionContext.execute_async_v3"] = slow
    threads = [threading.Thread(target=run) for _ in range(3)]
    threads[0].start()
    assert entered.wait(10)
    for thread in threads[1:]:
        thread.start()
    until(lambda: len(opened._lanes._condition._waiters) == 2)  # type: ignore[attr-defined]
    opened.close()
    assert stub.live()["streams"] == 1, "still in use"
    go_on.set()
    for thread in threads:
        thread.join(10)
    np.testing.assert_array_equal(masks, [simulation.masks(image)])
    assert told == ["this session is closed; load the engine again"] * 2
    assert stub.live() == {}


def until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        time.sleep(0.005)
    raise AssertionError("it never came true")


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------


def test_ctrl_c_while_waiting_for_a_context(simulation: Simulation, driver: DriverName, stub: Stub) -> None:
    image = an_image()
    with session(simulation, driver, SessionOptions(contexts=1)) as opened:
        lane = opened._lanes.take(wait=True)
        assert lane is not None
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            opened.run(image)
        timer.join()
        opened._lanes.put(lane)
        np.testing.assert_array_equal(opened.run(image)["mask"], simulation.masks(image))


def test_ctrl_c_does_not_take_the_turn_of_the_next_in_line(simulation: Simulation, driver: DriverName) -> None:
    """Woken and interrupted at once, a waiter must wake another: the lane it was woken for is there to be had."""
    with session(simulation, driver, SessionOptions(contexts=1)) as opened:
        lane = opened._lanes.take(wait=True)
        assert lane is not None
        real = opened._lanes._condition.wait
        first = threading.get_ident()

        def interrupted(timeout: float | None = None) -> bool:
            done = real(timeout)
            if threading.get_ident() == first:
                raise KeyboardInterrupt
            return done

        opened._lanes._condition.wait = interrupted  # type: ignore[method-assign]
        served = threading.Event()

        def other() -> None:
            until(lambda: len(opened._lanes._condition._waiters) == 1)  # type: ignore[attr-defined]  # behind the first
            opened.run(an_image())
            served.set()

        def giver() -> None:
            until(lambda: len(opened._lanes._condition._waiters) == 2)  # type: ignore[attr-defined]
            opened._lanes.put(lane)

        threads = [threading.Thread(target=work, daemon=True) for work in (other, giver)]
        for thread in threads:
            thread.start()
        with pytest.raises(KeyboardInterrupt):
            opened.run(an_image())
        assert served.wait(10), "the second waiter was never woken"
        for thread in threads:
            thread.join(10)


def test_ctrl_c_in_the_middle_of_an_inference(simulation: Simulation, driver: DriverName, stub: Stub) -> None:
    image = an_image()
    inner = simulation.recorder.behaviour["IExecutionContext.execute_async_v3"]

    def interrupted(context: object, stream_handle: int) -> object:
        inner(context, stream_handle)
        raise KeyboardInterrupt

    with session(simulation, driver, SessionOptions(contexts=1)) as opened:
        simulation.recorder.behaviour["IExecutionContext.execute_async_v3"] = interrupted
        for ways in (lambda: opened.run(image), lambda: list(opened.run_many([image, image]))):
            with pytest.raises(KeyboardInterrupt):
                ways()
            assert stub.contexts() == []
        simulation.recorder.behaviour["IExecutionContext.execute_async_v3"] = inner
        np.testing.assert_array_equal(opened.run(image)["mask"], simulation.masks(image))


# -- fork -------------------------------------------------------------------------------------------------------------


def in_a_fork(work: Callable[[], None]) -> None:
    """Run ``work`` in a forked process; fails if it raises there, or hangs."""
    with warnings.catch_warnings():
        # Newer Pythons warn of forking with threads, which is what is tried here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            signal.alarm(20)
            work()
            code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_forked_process_is_told_and_calls_nothing(simulation: Simulation, driver: DriverName, stub: Stub) -> None:
    image = an_image()
    opened = session(simulation, driver)
    result_of = opened.run(image)

    def work() -> None:
        stub.record_calls()
        for call in (lambda: opened.run(image), lambda: list(opened.run_many([image])), lambda: open_cuda(driver)):
            with pytest.raises(DeviceError, match=r"forked after the GPU was opened.*spawn"):
                call()
        opened.close()
        opened.__del__()
        assert stub.calls() == [], "the parent's GPU was touched"

    in_a_fork(work)
    held = threading.Event()
    done = threading.Event()

    def hold() -> None:
        with opened._lanes._condition:
            held.set()
            done.wait(30)

    # The lock of the pool may be held by a thread that the child does not have.
    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(10)
    in_a_fork(work)
    done.set()
    holder.join()
    np.testing.assert_array_equal(opened.run(image)["mask"], result_of["mask"])
    opened.close()
    assert stub.live() == {}
