"""PyTorch on a real GPU: the baseline engines are compared with. Needs a PyTorch for CUDA; TensorRT is not needed."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from device_engines import images
from in_threads import in_threads

pytestmark = [
    pytest.mark.gpu,
    # torch.compile of PyTorch 2.11 says it to itself.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]

torch = pytest.importorskip("torch", reason="a PyTorch for CUDA")
pytorch = pytest.importorskip("edgeseg.backends.pytorch", reason="a PyTorch for CUDA")

from edgeseg.spec import InputSpec, ModelSpec, OutputSpec, PipelineSpec  # noqa: E402  after the skips

SIDE = 256


@pytest.fixture(autouse=True)
def _cuda() -> None:
    if (reason := pytorch.why_no_cuda()) is not None:
        pytest.skip(f"needs a PyTorch that can use a GPU: {reason}")


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 5, 3, padding=1)]
    return torch.nn.Sequential(*layers).eval().requires_grad_(False)


def session(network: Any, **how: Any) -> Any:
    spec = PipelineSpec(ModelSpec("unet", classes=5), InputSpec(SIDE, SIDE), output=OutputSpec("logits"))
    return pytorch.PyTorchSession(SimpleNamespace(module=network), spec, **how)


VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {"exact": True},
    "fp32": {},
    "channels-last": {"channels_last": True},
    "fp16": {"float16": True},
    "bf16": {"bfloat16": True},
    "compile": {"compiled": True},
}
CLOSE = {"exact": 1e-4, "fp32": 2e-2, "channels-last": 2e-2, "compile": 2e-2, "fp16": 2e-2, "bf16": 1e-1}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gpu_computes_what_the_cpu_does(network: Any, figures: dict[str, Any], variant: str) -> None:
    given = images(4)
    with session(network) as here, session(network, device="cuda", **VARIANTS[variant]) as there:
        figures.update(there.options)
        for image in given:
            np.testing.assert_allclose(
                there.run(image)["logits"], here.run(image)["logits"], atol=CLOSE[variant], rtol=CLOSE[variant]
            )
        until = time.perf_counter() + 0.3
        while time.perf_counter() < until:
            there.run(given[0])
        times = [there.run_timed(given[0])[1] for _ in range(100)]
        for name in ("h2d_ms", "compute_ms", "d2h_ms", "enqueue_ms"):
            figures[f"median_{name}"] = float(np.median([getattr(one, name) for one in times]))
            assert figures[f"median_{name}"] > 0
        figures["gpu_bytes"] = there.gpu_bytes


def test_the_exact_reference_repeats_itself(network: Any) -> None:
    with session(network, device="cuda", exact=True) as there:
        first = [there.run(image)["logits"] for image in images(4)]
        for _ in range(5):
            for before, image in zip(first, images(4), strict=True):
                np.testing.assert_array_equal(there.run(image)["logits"], before)


def test_eight_threads_of_pytorch(network: Any) -> None:
    given = images(8)
    wrong: list[int] = []
    with session(network, device="cuda", exact=True) as there:
        expected = [there.run(image)["logits"] for image in given]

        def work(seed: int) -> None:
            for image, logits in zip(given, expected, strict=True):
                if not np.array_equal(there.run(image)["logits"], logits):
                    wrong.append(seed)

        in_threads(8, work)
    assert wrong == []


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_stays_on_the_gpu(network: Any, figures: dict[str, Any], compiled: bool) -> None:
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        with session(network, device="cuda", compiled=compiled) as there:
            there.run(images(1)[0])
            assert torch.cuda.memory_allocated() > before
    figures["left_bytes"] = torch.cuda.memory_allocated() - before
    assert figures["left_bytes"] == 0
    assert all(parameter.device.type == "cpu" for parameter in network.parameters())
