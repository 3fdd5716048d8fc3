"""Models of the Hugging Face hub by id: from a cache in huggingface_hub's own layout, and fetched from a hub on this machine."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeseg
from edgeseg.convert.hub_models import fetch_model, is_hub_id
from edgeseg.convert.model_card import read_card
from edgeseg.convert.saved_preprocessing import CONFIG_NAME
from edgeseg.errors import CheckpointError, SpecError
from edgeseg.spec import ModelRequest
from edgeseg.store.manifest import WeightsOrigin

torch = pytest.importorskip("torch")
hub = pytest.importorskip("huggingface_hub")
from local_hub import Hub, local_hub  # noqa: E402  needs huggingface_hub

from edgeseg.convert.architectures import import_smp  # noqa: E402  needs torch
from edgeseg.convert.load import load_model  # noqa: E402

smp = import_smp()
pytestmark = pytest.mark.integration

NAME = "someone/fpn-streets"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TRANSFORM = (
    '{"__version__": "2.0.8", "transform": {"__class_fullname__": "Compose", "p": 1.0, "transforms": ['
    '{"__class_fullname__": "Resize", "p": 1, "height": 64, "width": 96, "interpolation": 1},'
    '{"__class_fullname__": "Normalize", "p": 1, "mean": [120, 110, 100], "std": [60, 50, 40], "max_pixel_value": 1.0}]}}'
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What SMP's ``save_pretrained`` writes, and the transform beside it."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(2)
    args = {"decoder_pyramid_channels": 16, "decoder_segmentation_channels": 32}
    smp.FPN("mobilenet_v2", encoder_weights=None, classes=3, **args).eval().save_pretrained(folder)
    (folder / CONFIG_NAME).write_text(TRANSFORM)
    return folder


def put(cache: Path, saved: Path, *names: str, absent: tuple[str, ...] = ()) -> None:
    """Lay files into a cache as huggingface_hub does: blobs by hash, snapshots of links, refs, and what is known to be absent."""
    repository = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "blobs", repository / "refs", repository / ".no_exist" / COMMIT):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for name in names:
        content = (saved / name).read_bytes()
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    for name in absent:
        (repository / ".no_exist" / COMMIT / name).touch()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub that may not be asked."""
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


EVERY = ("config.json", "model.safetensors", CONFIG_NAME, "README.md")


def test_a_cached_model_is_the_one_that_was_saved(cache: Path, saved: Path) -> None:
    put(cache, saved, *EVERY)
    # The layout is the hub's own: its functions read it.
    assert Path(hub.hf_hub_download(NAME, "config.json", local_files_only=True)).parent.name == COMMIT
    for asked in (NAME, f"{NAME}@main", f"{NAME}@{COMMIT}"):
        assert fetch_model(asked, needs_preprocessing=True).folder.name == COMMIT
    loaded = load_model(ModelRequest(weights=NAME))
    expected = smp.from_pretrained(saved).eval()
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(loaded.module(image), expected(image))
    assert loaded.origin is not None
    assert loaded.origin.hub_id == f"{NAME}@{COMMIT}"
    assert f"at revision {COMMIT}" in loaded.weights
    assert loaded.preprocess.mean == (120.0, 110.0, 100.0)
    assert loaded.preprocess.scale == 1.0
    # SMP's card says mit whatever the weights are.
    assert loaded.origin.card["license"] == "mit"
    assert str(loaded.origin.licence_words).startswith('says "mit"; SMP writes that into every card')


def test_an_engine_knows_where_it_is_from_and_how_to_be_made_again(cache: Path, saved: Path, tmp_path: Path) -> None:
    put(cache, saved, *EVERY)
    engine = edgeseg.build(
        weights=NAME, precision="fp32", output_kind="logits", target="onnxruntime", output=tmp_path / "engine"
    )
    manifest = engine.manifest
    assert manifest.origin is not None
    assert (manifest.origin.repository, manifest.origin.revision) == (NAME, COMMIT)
    assert manifest.command is not None
    assert f"--weights {NAME}@{COMMIT}" in manifest.command
    assert manifest.model_request is not None
    assert manifest.model_request.weights == f"{NAME}@{COMMIT}"
    assert (manifest.spec.input.height, manifest.spec.input.width) == (64, 96)
    assert any(CONFIG_NAME in note and "Resize(64, 96)" in note for note in manifest.notes)
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    tensor = (torch.from_numpy(image).float() - torch.tensor([120, 110, 100])) / torch.tensor([60, 50, 40])
    with torch.no_grad():
        expected = smp.from_pretrained(saved).eval()(tensor.permute(2, 0, 1)[None])[0].numpy()
    with edgeseg.load(engine.folder) as segmenter:
        np.testing.assert_allclose(segmenter.predict(image).logits, expected, atol=2e-4)


def test_offline_without_the_model_is_one_line(cache: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"no file or folder here.*HF_HUB_OFFLINE is set.*hf download someone/other"
    ):
        load_model(ModelRequest(weights="someone/other"))


def test_a_preprocessing_nobody_knows_of_is_not_ignored(cache: Path, saved: Path) -> None:
    """``smp.from_pretrained`` alone leaves the transform out of the cache: silence would be a wrong normalization."""
    put(cache, saved, "config.json", "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"the saved preprocessing \({CONFIG_NAME}\).*or give --mean and --std"):
        load_model(ModelRequest(weights=NAME))
    loaded = load_model(ModelRequest(weights=NAME, mean=(0.5,) * 3, std=(0.5,) * 3))
    assert loaded.preprocess.mean == (0.5,) * 3


def test_a_preprocessing_known_to_be_absent_is_none(cache: Path, saved: Path) -> None:
    put(cache, saved, "config.json", "model.safetensors", absent=(CONFIG_NAME,))
    loaded = load_model(ModelRequest(weights=NAME))
    assert loaded.saved is None
    assert loaded.origin == WeightsOrigin(NAME, COMMIT, {})


def test_an_unreachable_hub_is_said_before_anything_slow_is_imported(tmp_path: Path) -> None:
    """As from the shell: imports, no network, an empty cache."""
    code = (
        "import sys\nfrom edgeseg.convert.load import load_model\nfrom edgeseg.pipeline.plan import refuse_early\n"
        "from edgeseg.pipeline.request import BuildRequest\nfrom edgeseg.spec import ModelRequest\n"
        "for ask in (\n"
        " lambda: refuse_early(BuildRequest(weights='smp-hub/segformer-b0-ade', precision='fp32'), is_module=False),\n"
        " lambda: load_model(ModelRequest(arch='fpn', weights='imagenet')),\n"
        "):\n try: ask()\n except Exception as exc: print(type(exc).__name__, exc)\n"
        "print([m for m in ('torch', 'segmentation_models_pytorch') if m in sys.modules])\n"
    )
    offline = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=offline)
    model, encoder, imported = done.stdout.splitlines()
    assert (
        model.startswith("CheckpointError smp-hub/segformer-b0-ade, no file or folder here")
        and "does not answer" in model
    )
    known = "CheckpointError pretrained weights of resnet34 are not cached and http://127.0.0.1:9 does"
    assert encoder.startswith(known) and "give --weights PATH" in encoder
    assert imported == "[]"


@pytest.fixture
def server(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine that has the model, and an empty cache."""
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    with local_hub(monkeypatch, tmp_path / "hub", files, NAME, COMMIT) as running:
        yield running


def test_a_model_is_fetched_once_and_data_only(server: type[Hub]) -> None:
    server.files = {**server.files, "modeling.py": b"raise SystemExit('run')"}
    loaded = load_model(ModelRequest(weights=NAME))
    assert loaded.origin is not None
    assert loaded.origin.hub_id == f"{NAME}@{COMMIT}"
    assert loaded.preprocess.source == CONFIG_NAME
    assert {path.rsplit("/", 1)[-1] for path in server.asked} == set(EVERY)
    server.asked.clear()
    again = load_model(ModelRequest(weights=NAME))
    assert again.weights_sha256 == loaded.weights_sha256
    assert server.asked == []
    assert "newer ones are not asked for" in again.notes[0]


def test_a_model_the_hub_has_not_is_one_line(server: type[Hub]) -> None:
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"someone/else.*has it not, or not for you \(HTTP 404 Not Found\)"):
        load_model(ModelRequest(weights="someone/else"))
    assert time.perf_counter() - start < 5


def test_a_repository_without_safetensors_says_so(server: type[Hub]) -> None:
    server.files = {"config.json": server.files["config.json"]}
    with pytest.raises(CheckpointError, match=r"has no config\.json or no model\.safetensors"):
        load_model(ModelRequest(weights=NAME))


@pytest.mark.parametrize(
    ("weights", "is_id"),
    [
        ("smp-hub/segformer-b0-512x512-ade-160k", True),
        ("user/model@v1.0", True),
        ("user/model@refs/pr/3", True),
        ("imagenet", False),
        ("user/model@../../etc", False),
        ("../model", False),
        ("/user/model", False),
        ("a/b/c", False),
        ("runs/best.pth", False),
        ("~/model", False),
        ("user/", False),
    ],
)
def test_ids_are_told_from_paths(weights: str, is_id: bool) -> None:
    assert is_hub_id(weights) is is_id


def test_a_folder_that_is_there_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("user/model")
    with pytest.raises(CheckpointError, match="not a save_pretrained folder"):
        load_model(ModelRequest(weights="user/model"))


@pytest.mark.parametrize(
    ("text", "card"),
    [
        (
            "---\nlicense: apache-2.0\ntags: [a, b]\nwidget: {x: 1}\n---\n# Hi",
            {"license": "apache-2.0", "tags": ["a", "b"]},
        ),
        ("---\r\nlicense: other\r\nlicense_name: mine\r\n---\r\n", {"license": "other", "license_name": "mine"}),
        ("# no metadata", {}),
        ("---\nlicense: [unclosed\n---\n", {}),
        ("---\nlicense: !!python/object/apply:os.system [id]\n---\n", {}),
        ("---\na: &a [x, x]\ntags: *a\n---\n", {}),
        ("---\nlicense: {a: 1}\n---\n", {}),
        ("---\n- license\n---\n", {}),
    ],
)
def test_cards_are_read_as_data(text: str, card: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text.encode())
    assert read_card(tmp_path) == card


def test_a_weights_key_is_for_files(cache: Path, saved: Path) -> None:
    put(cache, saved, *EVERY)
    with pytest.raises(SpecError, match="weights_key"):
        load_model(ModelRequest(weights=NAME, weights_key="ema"))
