"""The PyTorch session against the model called by hand, for every task, output kind and activation."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from in_threads import in_threads
from numpy.typing import NDArray
from PIL import Image

from edgeseg.errors import BuildError, DeviceError, InputError, SpecError
from edgeseg.runtime.segmenter import Segmenter
from edgeseg.spec import InputSpec, ModelSpec, OutputSpec, PipelineSpec, Preprocess

torch = pytest.importorskip("torch")
pytest.importorskip("segmentation_models_pytorch")
from export_models import SmallNet  # noqa: E402

from edgeseg.backends.pytorch import CudaRuntime, PyTorchSession, why_no_cuda  # noqa: E402  need torch, which may be missing

pytestmark = pytest.mark.integration

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def model(classes: int, activation: str | None, *, labels: int = 0) -> Any:
    torch.manual_seed(0)
    return SmallNet(3, classes, activation, labels).eval().requires_grad_(False)


def session(module: Any, task: str, classes: int, activation: str | None, **options: Any) -> PyTorchSession:
    preprocess = options.pop("preprocess", Preprocess(mean=MEAN, std=STD))
    named = ("channels_last", "compiled", "bfloat16", "float16", "threads", "device", "exact", "runtime", "with_scores")
    flags = {k: options.pop(k) for k in named if k in options}
    spec = PipelineSpec(
        model=ModelSpec("fpn", "resnet18", classes=classes, task=task, activation=activation),  # type: ignore[arg-type]
        input=InputSpec(64, 96),
        preprocess=preprocess,
        output=OutputSpec(**options),
    )
    return PyTorchSession(SimpleNamespace(module=module), spec, **flags)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    coarse = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def by_hand(module: Any, images: NDArray[np.uint8], *, bgr: bool = False, scale: float = 1 / 255) -> Any:
    x = images.astype(np.float64)[..., ::-1] if bgr else images.astype(np.float64)
    x = (x * scale - np.array(MEAN)) / np.array(STD)
    with torch.no_grad():
        return module(torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).float())


def share_equal(a: NDArray[Any], b: NDArray[Any]) -> float:
    assert a.shape == b.shape
    return float((a == b).mean())


@pytest.mark.parametrize("activation", [None, "softmax", "logsoftmax", "sigmoid"])
def test_multiclass_mask_is_the_argmax_of_the_model(images: NDArray[np.uint8], activation: str | None) -> None:
    got = session(model(5, activation), "multiclass", 5, activation).run(images)["mask"]
    # All of these are increasing, so the winner is the winner of the logits.
    expected = by_hand(model(5, None), images).argmax(1).numpy()
    assert got.dtype == np.uint8
    assert len(np.unique(expected)) > 1
    assert share_equal(got, expected) >= 0.9999  # the input is normalized in float32 here, in float64 by hand


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_channel_order_and_scale_are_the_models(images: NDArray[np.uint8], order: str) -> None:
    module = model(5, None)
    preprocess = Preprocess(mean=MEAN, std=STD, scale=1 / 127.5, channel_order=order)  # type: ignore[arg-type]
    got = session(module, "multiclass", 5, None, preprocess=preprocess, kind="logits").run(images)["logits"]
    expected = by_hand(module, images, bgr=order == "bgr", scale=1 / 127.5).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("activation", [None, "sigmoid"])
@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_binary_mask_is_probability_above_the_threshold(
    images: NDArray[np.uint8], activation: str | None, threshold: float
) -> None:
    module = model(1, activation)
    got = session(module, "binary", 1, activation, threshold=threshold, confidence=True).run(images)
    raw = by_hand(module, images)
    p = (raw if activation else raw.sigmoid())[:, 0].numpy()
    threshold_is_crossed = 0 < (p > threshold).mean() < 1
    assert threshold_is_crossed or threshold != 0.5
    assert share_equal(got["mask"], p > threshold) >= 0.9999
    expected = np.where(got["mask"] == 1, p, 1 - p)
    np.testing.assert_allclose(got["confidence"], expected, atol=1e-4)


def test_multilabel_mask_is_one_plane_a_class(images: NDArray[np.uint8]) -> None:
    module = model(3, None)
    got = session(module, "multilabel", 3, None).run(images)["mask"]
    assert got.dtype == np.uint8
    assert share_equal(got, by_hand(module, images).sigmoid().numpy() > 0.5) >= 0.9999


@pytest.mark.parametrize("activation", [None, "softmax", "logsoftmax"])
def test_logits_and_probabilities(images: NDArray[np.uint8], activation: str | None) -> None:
    plain, activated = model(4, None), model(4, activation)
    logits = by_hand(plain, images)
    got = session(activated, "multiclass", 4, activation, kind="logits", confidence=True).run(images)
    np.testing.assert_allclose(got["logits"], logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(got["confidence"], logits.softmax(1).amax(1).numpy(), atol=1e-4)
    got = session(activated, "multiclass", 4, activation, kind="probabilities").run(images)
    np.testing.assert_allclose(got["probabilities"], logits.softmax(1).numpy(), atol=1e-4)


def test_a_kept_auxiliary_head_is_a_second_output(images: NDArray[np.uint8]) -> None:
    module = model(4, None, labels=6)
    got = session(module, "multiclass", 4, None).run(images)
    mask, label = by_hand(module, images)
    assert share_equal(got["mask"], mask.argmax(1).numpy()) >= 0.9999
    np.testing.assert_allclose(got["aux_logits"], label.numpy(), atol=1e-4)


def test_more_than_256_classes_need_uint16(images: NDArray[np.uint8]) -> None:
    module = model(300, None)
    got = session(module, "multiclass", 300, None).run(images)["mask"]
    assert got.dtype == np.uint16
    assert share_equal(got, by_hand(module, images).argmax(1).numpy()) >= 0.9999


def test_channels_last_gives_the_same_mask_and_leaves_the_callers_model_alone(images: NDArray[np.uint8]) -> None:
    module = model(5, None)
    expected = session(module, "multiclass", 5, None).run(images)["mask"]
    fast = session(module, "multiclass", 5, None, channels_last=True)
    assert share_equal(fast.run(images)["mask"], expected) >= 0.9999
    assert fast.options["channels_last"] is True
    weight = module.body.weight
    assert weight.is_contiguous()


def test_bfloat16_is_torchs_autocast(images: NDArray[np.uint8]) -> None:
    module = model(5, None)
    low = session(module, "multiclass", 5, None, bfloat16=True, kind="logits")
    with torch.autocast("cpu", torch.bfloat16):
        expected = by_hand(module, images)
    got = low.run(images)["logits"]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected.float().numpy())
    exact = session(module, "multiclass", 5, None, kind="logits").run(images)["logits"]
    assert 0 < np.abs(got - exact).max() < 0.1 * np.abs(exact).max()
    assert low.options["bfloat16"] is True


def test_read_only_images_and_views_are_taken_without_a_warning(images: NDArray[np.uint8]) -> None:
    run = session(model(5, None), "multiclass", 5, None).run
    expected = run(images)["mask"]
    frozen = images.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(run(frozen)["mask"], expected)
    np.testing.assert_array_equal(run(np.asfortranarray(images))["mask"], expected)


@pytest.mark.parametrize(
    "bad", [np.zeros((1, 64, 96, 4), np.uint8), np.zeros((64, 96, 3), np.uint8), np.zeros((1, 64, 96, 3))]
)
def test_what_is_no_image_is_refused(bad: NDArray[Any]) -> None:
    with pytest.raises(InputError, match=r"takes uint8 \(N, H, W, 3\)"):
        session(model(5, None), "multiclass", 5, None).run(bad)


def test_a_closed_session_says_so(images: NDArray[np.uint8]) -> None:
    with session(model(5, None), "multiclass", 5, None) as opened:
        opened.run(images)
    with pytest.raises(BuildError, match="closed"):
        opened.run(images)


def test_the_number_of_threads_is_given_back() -> None:
    before = torch.get_num_threads()
    with session(model(5, None), "multiclass", 5, None, threads=before + 1) as opened:
        assert torch.get_num_threads() == opened.options["threads"] == before + 1
    assert torch.get_num_threads() == before
    opened.close()
    session(model(5, None), "multiclass", 5, None).close()
    assert torch.get_num_threads() == before


def test_it_serves_a_segmenter_from_several_threads(images: NDArray[np.uint8]) -> None:
    opened = session(model(5, None), "multiclass", 5, None)
    segmenter = Segmenter(opened, opened.spec)
    big = images[0].repeat(2, axis=0)
    expected = segmenter(big)
    assert expected.shape == big.shape[:2]
    results: list[NDArray[Any]] = []
    in_threads(3, lambda _: results.append(segmenter(big)))
    assert len(results) == 3
    for result in results:
        np.testing.assert_array_equal(result, expected)


# --- the path of a GPU, on the CPU's memory: what CUDA does is stood in for; tests/gpu has the real one ---


class Event:
    """What torch.cuda.Event is asked, by a clock that only counts."""

    clock = 0

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.at = -1

    def record(self) -> None:
        Event.clock += 1
        self.at = Event.clock
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def elapsed_time(self, later: Event) -> float:
        assert 0 <= self.at < later.at, "of an event that was recorded before"
        return float(later.at - self.at)


def stand_in(log: list[str]) -> CudaRuntime:
    def pin(tensor: Any) -> Any:
        log.append("pin")
        return tensor.clone()

    return CudaRuntime(
        pin=pin,
        event=lambda: Event(log),
        name=lambda device: "a stand-in",
        peak_bytes=lambda device: 12345,
        release=lambda: log.append("release"),
    )


@pytest.mark.parametrize("variant", [{}, {"channels_last": True}, {"bfloat16": True}])
def test_on_a_device_the_outputs_are_those_of_the_cpu(images: NDArray[np.uint8], variant: dict[str, Any]) -> None:
    module = model(5, None, labels=3)
    here = session(module, "multiclass", 5, None, confidence=True, with_scores=True, **variant)
    log: list[str] = []
    there = session(
        module, "multiclass", 5, None, confidence=True, with_scores=True, runtime=stand_in(log), device="cpu", **variant
    )
    expected = here.run(images)
    for _ in range(2):
        got, times = there.run_timed(images)
        assert set(got) == set(expected) == {"mask", "confidence", "logits", "aux_logits"}
        for name, array in expected.items():
            np.testing.assert_array_equal(got[name], array)
            assert got[name].dtype == array.dtype and got[name].flags.owndata, "the caller's own"
        assert times is not None and (times.h2d_ms, times.compute_ms, times.d2h_ms) == (1.0, 1.0, 1.0)
        assert times.enqueue_ms > 0
    assert log.count("pin") == 1 + len(expected), "page-locked memory is kept from call to call"
    assert log[-5:] == ["record"] * 4 + ["synchronize"], "four marks, then the wait"
    kept = {name: array.copy() for name, array in got.items()}
    there.run(255 - images)
    for name, array in kept.items():
        np.testing.assert_array_equal(got[name], array)
    there.run(images[:1])  # another shape has memory of its own size
    assert here.run_timed(images)[1] is None and here.gpu_bytes is None and there.gpu_bytes == 12345
    assert "device" not in here.options and there.options["gpu"] == "a stand-in"


def test_the_callers_model_stays_where_it_is_and_nothing_stays_on_the_device() -> None:
    import gc
    import weakref

    module = model(5, None)
    before = [parameter.data_ptr() for parameter in module.parameters()]
    log: list[str] = []
    opened = session(module, "multiclass", 5, None, runtime=stand_in(log), channels_last=True)
    opened.run(np.zeros((1, 64, 96, 3), np.uint8))
    copies = [weakref.ref(parameter) for parameter in opened._module.parameters()]
    assert copies and not {p.data_ptr() for p in opened._module.parameters()} & set(before)
    opened.close()
    gc.collect()
    assert [ref() for ref in copies] == [None] * len(copies), "a copy of the weights outlived the session"
    assert log[-1] == "release"
    assert [parameter.data_ptr() for parameter in module.parameters()] == before
    with pytest.raises(BuildError, match="was closed"):
        opened.run(np.zeros((1, 64, 96, 3), np.uint8))
    opened.close()


def numerics() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    return cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.get_float32_matmul_precision()


def test_the_accuracy_reference_has_no_tf32_and_the_process_gets_its_settings_back() -> None:
    seen: list[tuple[object, ...]] = []

    class Watching(torch.nn.Conv2d):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            seen.append(numerics())
            return super().forward(x)

    module = torch.nn.Sequential(Watching(3, 2, 1)).eval().requires_grad_(False)
    image = np.zeros((1, 64, 96, 3), np.uint8)
    before = numerics()
    exact = session(module, "multiclass", 2, None, runtime=stand_in([]), exact=True)
    fast = session(module, "multiclass", 2, None, runtime=stand_in([]))
    for opened in (exact, fast, exact):
        opened.run(image)
    assert seen == [(False, True, False, "highest"), (True, False, True, "high"), (False, True, False, "highest")]
    assert {k: exact.options[k] for k in ("tf32", "cudnn_benchmark", "cudnn_deterministic")} == {
        "tf32": False, "cudnn_benchmark": False, "cudnn_deterministic": True,
    }  # fmt: skip
    assert fast.options["tf32"] and fast.options["cudnn_benchmark"]
    fast.close()
    exact.close()
    assert numerics() == before
    with session(module, "multiclass", 2, None, exact=True) as on_cpu:
        on_cpu.run(image)
        assert numerics() == before and "tf32" not in on_cpu.options


def test_threads_have_memory_of_their_own(images: NDArray[np.uint8]) -> None:
    module = model(5, None)
    with session(module, "multiclass", 5, None, runtime=stand_in([])) as there:
        expected = {flip: there.run(image)["mask"] for flip, image in ((0, images), (1, 255 - images))}
        wrong: list[int] = []

        def work(flip: int) -> None:
            for _ in range(10):
                got = there.run(255 - images if flip else images)["mask"]
                if not np.array_equal(got, expected[flip]):
                    wrong.append(flip)

        in_threads(4, lambda number: work(number % 2))
    assert wrong == [] and not np.array_equal(expected[0], expected[1])


def test_a_full_gpu_is_one_line() -> None:
    class Full(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    with (
        session(Full(), "multiclass", 2, None, runtime=stand_in([])) as opened,
        pytest.raises(
            DeviceError, match="too little memory on cpu: CUDA out of memory. Tried to allocate 2 GiB; close"
        ),
    ):
        opened.run(np.zeros((1, 64, 96, 3), np.uint8))


def test_what_is_asked_of_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="float16 is for a GPU"):
        session(model(2, None), "multiclass", 2, None, float16=True)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/gpu runs it")
    with monkeypatch.context() as patch:

        def too_old() -> bool:
            warnings.warn(
                "CUDA initialization: The NVIDIA driver on your system is too old (found 11040).", stacklevel=1
            )
            return False

        patch.setattr(torch.cuda, "is_available", too_old)
        assert "driver on your system is too old" in str(why_no_cuda())
    reason = why_no_cuda()
    assert reason is not None and str(torch.__version__) in reason
    with pytest.raises(DeviceError, match="install a PyTorch for CUDA, or run it on the CPU"):
        session(model(2, None), "multiclass", 2, None, device="cuda")


def test_a_build_for_a_gpu_is_never_timed_beside_a_cpu(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime stands for a GPU's backend: first beside a PyTorch without CUDA, then beside one that has it."""
    import edgeseg
    from edgeseg.backends import pytorch
    from edgeseg.pipeline import verification

    monkeypatch.setattr(verification, "GPU_TARGETS", ("onnxruntime",))
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse.repeat(16, 0).repeat(16, 1)).save(images / f"{number}.png")
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 3, 1))
    said: list[str] = []

    def build(name: str) -> Any:
        return edgeseg.build(
            network.eval(), precision="fp32", target="onnxruntime", size=(64, 64), mean=(0.5,) * 3, std=(0.2,) * 3,
            validation=images, output=tmp_path / name, reporter=said.append,
        ).manifest.verification  # fmt: skip

    monkeypatch.setattr(pytorch, "why_no_cuda", lambda: "the PyTorch here has no CUDA")
    alone = build("alone")
    assert alone.agreement > 0.999 and (alone.speedup, alone.pytorch_latency, alone.engine_latency) == (None,) * 3
    assert any("not timed beside PyTorch: the PyTorch here has no CUDA" in line for line in said)

    opened: list[tuple[str, bool]] = []

    class OnDevice(PyTorchSession):
        def __init__(self, loaded: Any, spec: Any, *, device: str = "cpu", exact: bool = False, **others: Any) -> None:
            opened.append((device, exact))
            runtime = stand_in([]) if device == "cuda" else None
            super().__init__(loaded, spec, exact=exact, runtime=runtime, **others)

    monkeypatch.setattr(pytorch, "why_no_cuda", lambda: None)
    monkeypatch.setattr(pytorch, "PyTorchSession", OnDevice)
    beside = build("beside")
    assert opened == [("cuda", True), ("cuda", False)], "accuracy beside the exact one, time beside the fast one"
    assert beside.agreement == alone.agreement and beside.speedup is not None
