"""What of loading works, or says what is missing, without torch and SMP."""

from __future__ import annotations

import http.server
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from edgeseg import demo
from edgeseg.convert import hub
from edgeseg.convert.architectures import resolve_activation, resolve_arch, resolve_task
from edgeseg.convert.preprocessing import RecordedNormalization, recorded_preprocess, resolve_preprocess
from edgeseg.convert.recorded import RecordedModel, merge
from edgeseg.errors import ArtifactError, SpecError
from edgeseg.spec import ARCHITECTURES, ModelRequest, Preprocess

GIVEN = ModelRequest(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def settle(request: ModelRequest, channels: int = 3) -> Preprocess:
    """The user's own values need no library at all."""
    preprocess, _ = resolve_preprocess(request, "resnet18", channels)
    return preprocess


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("FPN", "fpn"),
        ("DeepLabV3Plus", "deeplabv3plus"),
        ("DeepLabV3+", "deeplabv3plus"),
        ("deeplab-v3", "deeplabv3"),
        ("Unet++", "unetplusplus"),
        ("UNet", "unet"),
        ("MAnet", "manet"),
        ("UPerNet", "upernet"),
        *[(arch, arch) for arch in ARCHITECTURES],
    ],
)
def test_architectures_are_known_by_every_usual_spelling(written: str, meant: str) -> None:
    assert resolve_arch(written) == meant


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"unknown architecture 'deeplab'; did you mean 'deeplabv3'"):
        resolve_arch("deeplab")


def test_torch_is_imported_only_when_a_model_is_loaded() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'segmentation_models_pytorch', 'timm', 'safetensors'): sys.modules[name] = None\n"
        "from edgeseg.convert.load import load_model\n"
        "from edgeseg.spec import ModelRequest\n"
        "try: load_model(ModelRequest(arch='fpn'))\n"
        "except ImportError as exc: print(type(exc).__name__, exc)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        done.stdout.strip()
        == "MissingDependencyError torch is needed to convert a model: pip install 'edgeseg[convert]'"
    )


def test_given_normalization_is_taken_as_it_is() -> None:
    assert settle(GIVEN) == Preprocess((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 1 / 255, "rgb", "given")
    assert settle(replace(GIVEN, channel_order="bgr")).channel_order == "bgr"


def test_normalization_written_for_0_to_255_equals_the_same_in_0_to_1() -> None:
    large = settle(ModelRequest(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)))
    small = settle(ModelRequest(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)))
    for value in (0.0, 17.0, 255.0):
        for channel in range(3):
            a, b = ((value * p.scale - p.mean[channel]) / p.std[channel] for p in (large, small))
            assert a == pytest.approx(b, abs=1e-6)


def test_one_value_stands_for_all_channels() -> None:
    settled = settle(ModelRequest(mean=(0.5,), std=(0.25,)), channels=4)
    assert (settled.mean, settled.std) == ((0.5,) * 4, (0.25,) * 4)


@pytest.mark.parametrize(
    ("request_", "channels", "message"),
    [
        (ModelRequest(mean=(0.5,)), 3, "--mean given without --std"),
        (ModelRequest(std=(0.5,)), 3, "--std given without --mean"),
        (ModelRequest(mean=(0.5, 0.5), std=(0.5, 0.5)), 3, "--mean has 2 values, the model takes 3 channels"),
        (ModelRequest(mean=(0.5,), std=(0.5,), channel_order="bgr"), 1, "'bgr' is for 3 channels"),
        (ModelRequest(mean=(0.5,), std=(0.0,)), 3, "must be > 0"),
    ],
)
def test_impossible_normalization_is_refused(request_: ModelRequest, channels: int, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        settle(request_, channels)


def test_normalization_in_a_config_is_read_with_its_range_and_order() -> None:
    settings = {"mean": [1, 2, 3], "std": [4, 5, 6], "input_range": [0, 255], "input_space": "BGR"}
    expected = Preprocess((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), 1.0, "bgr", "the checkpoint's config")
    assert recorded_preprocess({"preprocess": settings}, {}) == RecordedNormalization(expected, scale_known=True)
    assert recorded_preprocess({"preprocess": {"mean": [0.5]}}, {}) is None
    with pytest.raises(SpecError, match="not numbers"):
        recorded_preprocess({"preprocess": {"mean": ["x"], "std": [1]}}, {})


def test_what_is_recorded_is_of_the_channels_as_the_network_gets_them() -> None:
    """As SMP's ``preprocess_input`` and buffers of a module do it: the first mean is the first channel's, blue's in BGR."""
    buffers = RecordedNormalization(
        Preprocess((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), source="buffers mean and std"), scale_known=True
    )
    settled, _ = resolve_preprocess(ModelRequest(channel_order="bgr"), "resnet18", 3, recorded=buffers)
    assert (settled.mean, settled.std, settled.channel_order) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bgr")


@pytest.mark.parametrize(
    ("classes", "activation", "task"),
    [
        (1, None, "binary"),
        (1, "sigmoid", "binary"),
        (5, None, "multiclass"),
        (5, "softmax", "multiclass"),
        (5, "sigmoid", "multilabel"),
    ],
)
def test_the_task_follows_from_classes_and_activation(classes: int, activation: str | None, task: str) -> None:
    assert resolve_task(None, classes, activation)[0] == task
    assert bool(resolve_task(None, classes, activation)[1]) == (task == "multilabel")
    assert resolve_task("multiclass", classes, activation) == ("multiclass", ())


def test_a_softmax_over_one_class_is_refused() -> None:
    with pytest.raises(SpecError, match="activation softmax over 1 class is always 1"):
        resolve_task(None, 1, "softmax")


def test_activations() -> None:
    assert [resolve_activation(n) for n in (None, "none", "identity", "Sigmoid", "softmax2d")] == [
        None,
        None,
        None,
        "sigmoid",
        "softmax2d",
    ]
    with pytest.raises(SpecError, match="unknown activation 'sofmax'; did you mean 'softmax'"):
        resolve_activation("sofmax")
    with pytest.raises(SpecError, match="what the mask output does"):
        resolve_activation("argmax2d")


RECORDED = RecordedModel(
    arch="fpn", encoder="resnet18", classes=4, model_args={"upsampling": 4, "x": [1]}, complete=True
)


def test_what_the_user_left_open_is_filled_from_the_record() -> None:
    merged = merge(ModelRequest(model_args={"x": (1,)}, arch="FPN"), RECORDED)
    assert (merged.arch, merged.encoder, merged.classes) == ("fpn", "resnet18", 4)
    assert merged.model_args["upsampling"] == 4


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ModelRequest(arch="unet"), "--arch unet contradicts the checkpoint's config.json, which says fpn"),
        (ModelRequest(encoder="resnet50"), "--encoder resnet50 contradicts"),
        (ModelRequest(classes=5), "--classes 5 contradicts"),
        (ModelRequest(model_args={"upsampling": 8}), "--model-arg upsampling=8 contradicts"),
    ],
)
def test_contradicting_a_record_is_refused(request_: ModelRequest, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        merge(request_, RECORDED)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/config.json"


def test_a_hub_that_never_answers_is_given_up_on(silent_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.2)
    problem = hub._probe(silent_server)
    assert problem is not None
    assert "does not answer (timed out" in problem or "does not answer (nothing within" in problem


def test_a_closed_port_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    problem = hub._probe(f"http://127.0.0.1:{port}/")
    assert problem is not None
    assert "refused" in problem.lower()


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers everything alike: ``status``, ``headers``; keeps what was asked with which token."""

    status: int
    headers_sent: Mapping[str, str]
    asked: list[str | None]

    def do_HEAD(self) -> None:
        self.asked.append(self.headers["Authorization"])
        self.send_response(self.status)
        for name, value in self.headers_sent.items():
            self.send_header(name, value)
        self.end_headers()

    def do_CONNECT(self) -> None:
        self.do_HEAD()

    def log_message(self, *args: object) -> None:
        """Stay quiet."""


@contextmanager
def answering(status: int, headers: Mapping[str, str]) -> Iterator[str]:
    Answering.status, Answering.headers_sent, Answering.asked = status, headers, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


PAGE = {"Content-Type": "text/html; charset=utf-8"}
COMMIT = {"X-Repo-Commit": "0" * 40}


@pytest.mark.parametrize(
    ("status", "headers", "words", "whoever"),
    [
        (200, COMMIT, None, None),
        (302, {**COMMIT, "Location": "https://elsewhere.example/file"}, None, None),
        (307, {"Location": "/api/resolve-cache/x"}, None, None),
        (401, {"X-Error-Message": "Repository not found"}, "HTTP 401 Unauthorized): check its name", None),
        (403, {"X-Error-Code": "GatedRepo"}, "gated ones need a login", None),
        (404, {"X-Error-Code": "RepoNotFound"}, "HTTP 404 Not Found): check its name", None),
        (
            404,
            PAGE,
            "answers HTTP 404 Not Found, not as a hub does: a proxy refuses",
            "HTTP 404 Not Found, not as a hub",
        ),
        (200, PAGE, "answers with a web page, which no hub does", "answers with a web page"),
        (
            302,
            {"Location": "http://login.example/?to=hub"},
            "sends everything to http://login.example",
            "login.example,",
        ),
        (407, PAGE, "the proxy in front of http://127.0.0.1", "wants a login"),
        (599, {}, "answers HTTP 599, not as", None),
    ],
)
def test_what_answers_in_place_of_the_hub_is_named(
    status: int, headers: dict[str, str], words: str | None, whoever: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with answering(status, headers) as address:
        for any_hub, expected in ((False, words), (True, whoever)):
            problem = hub._probe(f"{address}/user/model/resolve/main/config.json", any_hub=any_hub)
            assert (problem is None) if expected is None else (expected in (problem or ""))
    # A private model is there for its owner, whose token goes to nobody else.
    assert Answering.asked == ["Bearer hf_secret"] * 2


def test_a_proxy_that_wants_a_login_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an encrypted connection a proxy answers the CONNECT before it."""
    with answering(407, {}) as address:
        monkeypatch.setenv("https_proxy", address)
        problem = hub._probe("https://hub.example/user/model/resolve/main/config.json")
    assert problem == hub._PROXY_LOGIN.format("https://hub.example")
    assert Answering.asked == [None]


def test_demo_models_are_the_descriptions_with_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_FOLDER", tmp_path)
    for name in ("unet.json", "unet.safetensors", "fpn.json"):
        (tmp_path / name).touch()
    assert demo.demo_models() == ("unet",)
    assert demo.demo_files("unet") == (tmp_path / "unet.json", tmp_path / "unet.safetensors")
    with pytest.raises(ArtifactError, match="no demo model for 'fpn' \\(there are: unet\\)"):
        demo.demo_files("fpn")


def test_sample_images_are_found_in_the_package_then_in_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "edgeseg" / "demo"
    checkout = tmp_path / "calibration" / "demo"
    for folder in (package / "sample", checkout):
        folder.mkdir(parents=True)
    monkeypatch.setattr(demo, "_FOLDER", package)
    with pytest.raises(ArtifactError, match="generate_demo.py"):
        demo.sample_folder()
    (checkout / "a.jpg").touch()
    assert demo.sample_folder() == checkout
    (package / "sample" / "a.jpg").touch()
    assert demo.sample_folder() == package / "sample"
