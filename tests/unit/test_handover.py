"""Engines as other hosts take them. Oracles: Triton's own configuration format, ONNX Runtime on the exported file, YAML."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import yaml
from click.testing import CliRunner
from cpu_folders import CLASSES, IMAGES, SIDE, folder_for, own_scheme
from handed_over import assert_whole, changed
from PIL import Image

import edgeseg
from edgeseg.cli.app import cli
from edgeseg.errors import ArtifactError, EdgesegError, OutputExistsError, SpecError
from edgeseg.handover.folder import export_engine
from edgeseg.handover.triton import REPOSITORY
from edgeseg.spec import BatchRange, InputSpec, ModelSpec, OutputSpec, PipelineSpec
from edgeseg.store.engine import open_engine, read_manifest
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import WeightsOrigin


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_for(tmp_path_factory.mktemp("made") / "street scenes", "onnxruntime", own_scheme())


@pytest.fixture
def engine(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "engine"))


def configuration(output: Path) -> Any:
    """``config.pbtxt`` as Triton reads it: parsed with the message classes its client ships."""
    client = importlib.util.find_spec("tritonclient")
    if client is None or not client.submodule_search_locations:
        pytest.skip("tritonclient, which has Triton's configuration format, is not installed")
    # By file: the package around it wants gRPC.
    path = Path(client.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    at = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert at is not None
    assert at.loader is not None
    messages = importlib.util.module_from_spec(at)
    at.loader.exec_module(messages)
    from google.protobuf import text_format

    (text,) = output.glob(f"{REPOSITORY}/*/config.pbtxt")
    return text_format.Parse(text.read_text(), messages.ModelConfig())


@pytest.mark.parametrize(
    ("dtype", "plan", "type_", "word"),
    [("uint16", False, 3, "UINT16"), ("uint16", True, 11, "FP32"), ("float32", False, 11, "FP32")],
)
def test_triton_is_told_the_images_dtype(
    engine: Path, tmp_path: Path, dtype: Any, plan: bool, type_: int, word: str
) -> None:
    """TensorRT has no 16-bit integers: a plan takes float32. Numbers are those of Triton's ``DataType``."""
    spec = read_manifest(engine).spec
    known = read_manifest(engine).engine
    assert known is not None
    changed(
        engine, spec=replace(spec, input=replace(spec.input, dtype=dtype)), target="tensorrt" if plan else "onnxruntime"
    )
    export_engine(engine, "triton", tmp_path / "out")
    config = configuration(tmp_path / "out")
    assert config.input[0].data_type == type_
    assert config.model_warmup[0].inputs["image"].data_type == type_
    text = (tmp_path / "out" / "README.md").read_text()
    assert f'"{word}")' in text
    assert f"np.{'float32' if type_ == 11 else dtype})" in text


def test_triton_gets_a_repository_whose_model_is_the_engine(engine: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export_engine(engine, "triton", output)
    listing = assert_whole(output)
    assert listing.engine_key == read_manifest(engine).engine_key
    config = configuration(output)
    model = output / REPOSITORY / config.name
    assert model.is_dir()
    assert " " not in config.name
    assert (config.backend, config.max_batch_size) == ("onnxruntime", 0)
    # What the configuration says is what the file has, and gives the engine's masks.
    session = onnxruntime.InferenceSession(model / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    (image,), (mask,) = config.input, config.output
    assert [i.name for i in session.get_inputs()] == [image.name]
    assert list(image.dims) == list(session.get_inputs()[0].shape) == [1, SIDE, SIDE, 3]
    assert list(mask.dims) == [1, SIDE, SIDE]
    assert (image.data_type, mask.data_type) == (2, 2)  # TYPE_UINT8
    (actual,) = session.run([mask.name], {image.name: IMAGES})
    with edgeseg.load(engine) as segmenter:
        np.testing.assert_array_equal(actual[0], segmenter(IMAGES[0]))
    assert len((model / mask.label_filename).read_text().splitlines()) == CLASSES
    (warm,) = config.model_warmup
    assert list(warm.inputs["image"].dims) == [1, SIDE, SIDE, 3]
    readme = (output / "README.md").read_text()
    assert "tritonserver --model-repository" in readme
    assert f'.infer("{config.name}"' in readme


TWO = PipelineSpec(
    ModelSpec("custom", classes=2, class_names=("road", "sky"), model_args={"aux_params": {"classes": 7}}),
    InputSpec(32, 64, stride=32, dynamic_size=True, min_size=(32, 32), max_size=(64, 64), batch=BatchRange(1, 4, 8)),
    output=OutputSpec("probabilities", confidence=True),
)


def test_triton_batches_for_an_engine_of_any_batch(engine: Path, tmp_path: Path) -> None:
    export_engine(changed(engine, spec=TWO, options={"threads": 2}), "triton", tmp_path / "out")
    config = configuration(tmp_path / "out")
    assert config.max_batch_size == 8
    assert config.HasField("dynamic_batching")
    assert [list(t.dims) for t in (*config.input, *config.output)] == [[-1, -1, 3], [2, -1, -1], [-1, -1], [7]]
    assert [t.name for t in config.output] == ["probabilities", "confidence", "aux_logits"]
    assert {t.data_type for t in config.output} == {11}  # TYPE_FP32
    assert config.parameters["intra_op_thread_count"].string_value == "2"
    assert list(config.model_warmup[0].inputs["image"].dims) == [32, 64, 3]


@pytest.mark.parametrize(
    ("model", "output", "kind", "dims", "label_lines"),
    [
        (ModelSpec("custom", classes=300), OutputSpec(), 3, [1, 32, 32], 300),  # TYPE_UINT16
        (ModelSpec("custom", classes=1, task="binary"), OutputSpec(), 2, [1, 32, 32], 2),
        (ModelSpec("custom", classes=3, task="multilabel"), OutputSpec(), 2, [1, 3, 32, 32], 3),
        (ModelSpec("custom", classes=3), OutputSpec("logits"), 11, [1, 3, 32, 32], 3),
    ],
)
def test_every_kind_of_output(
    model: ModelSpec, output: OutputSpec, kind: int, dims: list[int], label_lines: int, engine: Path, tmp_path: Path
) -> None:
    export_engine(
        changed(engine, spec=PipelineSpec(model, InputSpec(32, 32), output=output)), "triton", tmp_path / "out"
    )
    config = configuration(tmp_path / "out")
    (told,) = config.output
    assert (told.data_type, list(told.dims)) == (kind, dims)
    labels = (tmp_path / "out" / REPOSITORY / config.name / told.label_filename).read_text().splitlines()
    assert len(labels) == label_lines


def test_triton_gets_the_plan_where_there_is_one(engine: Path, tmp_path: Path) -> None:
    plan = read_manifest(engine).engine
    export_engine(changed(engine, target="tensorrt", versions={"tensorrt": "10.3.0"}), "triton", tmp_path / "out")
    config = configuration(tmp_path / "out")
    assert config.backend == "tensorrt"
    assert config.instance_group[0].kind == 1  # KIND_GPU
    assert plan is not None
    assert sha256_file(tmp_path / "out" / REPOSITORY / config.name / "1" / "model.plan") == plan.sha256
    assert "10.3.0" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "tensorrt-rtx"}, "no backend for TensorRT-RTX; build with --target"),
        ({"target": "tensorrt", "engine": None}, "portable graph, no plan.*edgeseg compile"),
        ({"spec": replace(TWO, input=replace(TWO.input, batch=BatchRange(2, 4, 8)))}, "build with --batch 1:N:M"),
    ],
)
def test_what_triton_cannot_run_is_refused(fields: dict[str, Any], message: str, engine: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=message):
        export_engine(changed(engine, **fields), "triton", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def card(output: Path) -> dict[str, Any]:
    _, head, _ = (output / "README.md").read_text().split("---\n", 2)
    metadata: dict[str, Any] = yaml.safe_load(head)
    return metadata


def test_the_hub_gets_an_engine_folder_with_a_card(engine: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(IMAGES[0]).save(photo)
    changed(engine, origin=WeightsOrigin("someone/model", "0" * 40, {"license": "mit"}))
    output = tmp_path / "out"
    export_engine(engine, "hub", output, licence="apache-2.0", picture=photo)
    assert_whole(output)
    assert card(output)["license"] == "apache-2.0"
    assert card(output)["base_model"] == "someone/model"
    text = (output / "README.md").read_text()
    assert "| agreement with PyTorch | - | 0.9900 |" in text
    assert "| mIoU | - | - |" in text
    assert "noisy" not in text
    with Image.open(output / "picture.png") as shown:
        assert shown.size == (2 * SIDE, SIDE)
    # It is the engine: whoever downloads it runs it.
    with edgeseg.load(output) as there, edgeseg.load(engine) as here:
        np.testing.assert_array_equal(there(IMAGES[0]), here(IMAGES[0]))


def test_a_graph_that_is_compiled_elsewhere_has_its_picture_too(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(IMAGES[0]).save(photo)
    pictures = []
    for name, portable_only in (("here", False), ("elsewhere", True)):
        folder = folder_for(tmp_path / name, "onnxruntime", own_scheme(), portable_only=portable_only)
        export_engine(folder, "hub", tmp_path / f"{name}-hub", licence="mit", picture=photo)
        pictures.append((tmp_path / f"{name}-hub" / "picture.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_noisy_times_are_called_so(engine: Path, tmp_path: Path) -> None:
    v = read_manifest(engine).verification
    assert v is not None
    assert v.engine_latency is not None
    noisy = replace(v, engine_latency=replace(v.engine_latency, noise=("the clock was held back",)))
    export_engine(changed(engine, verification=noisy), "hub", tmp_path / "out", licence="mit")
    assert "They are noisy" in (tmp_path / "out" / "README.md").read_text()


def test_paths_may_be_words_as_for_load(engine: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "street.png")
    picture = str(tmp_path / "street.png")
    listing = export_engine(str(engine / "manifest.json"), "hub", str(tmp_path / "a"), licence="mit", picture=picture)
    assert listing == export_engine(engine, "hub", tmp_path / "b", licence="mit", picture=Path(picture))


def test_a_plan_is_not_uploaded(engine: Path, tmp_path: Path) -> None:
    plan = read_manifest(engine).engine
    export_engine(changed(engine, target="tensorrt"), "hub", tmp_path / "out", licence="mit")
    assert_whole(tmp_path / "out")
    manifest = open_engine(tmp_path / "out").manifest
    assert plan is not None
    assert (manifest.engine, manifest.verification) == (None, None)
    assert not (tmp_path / "out" / plan.name).exists()
    assert "edgeseg compile model" in (tmp_path / "out" / "README.md").read_text()


def test_a_licence_is_asked_for_never_guessed(engine: Path, tmp_path: Path) -> None:
    known = {"license": "mit", "library_name": "segmentation-models-pytorch"}
    changed(engine, origin=WeightsOrigin(card=known))
    with pytest.raises(SpecError, match=r'give --license.*the card beside the weights says "mit"; SMP writes that'):
        export_engine(engine, "hub", tmp_path / "out")
    with pytest.raises(SpecError, match="small letters"):
        export_engine(engine, "hub", tmp_path / "out", licence="mit\nbase_model: x")


def test_names_cannot_write_into_card_or_configuration(engine: Path, tmp_path: Path) -> None:
    nasty = 'a"\n---\nlicense: x\n<script>|`_b_'
    model = ModelSpec("custom", nasty, classes=CLASSES, class_names=(nasty,) * CLASSES)
    spec = replace(read_manifest(engine).spec, model=model)
    changed(engine, name=nasty, spec=spec, origin=WeightsOrigin(nasty, nasty, {}))
    export_engine(engine, "hub", tmp_path / "hub", licence="mit")
    assert card(tmp_path / "hub")["license"] == "mit"
    assert card(tmp_path / "hub")["base_model"] == nasty
    text = (tmp_path / "hub" / "README.md").read_text().split("---\n", 2)[2]
    assert '# a" --- license: x &lt;script&gt;\\|\\`\\_b\\_\n' in text and "<script>" not in text
    export_engine(engine, "triton", tmp_path / "triton")
    assert "<script>" not in (tmp_path / "triton" / "README.md").read_text()
    config = configuration(tmp_path / "triton")
    assert (tmp_path / "triton" / REPOSITORY / config.name / "1" / "model.onnx").is_file()
    assert len((tmp_path / "triton" / REPOSITORY / config.name / "labels.txt").read_text().splitlines()) == CLASSES


def test_other_models_in_an_exported_repository_stay(engine: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export_engine(engine, "triton", output)
    (model,) = (output / REPOSITORY).iterdir()
    mine = [output / REPOSITORY / "mine" / "config.pbtxt", model / "2" / "model.onnx", model / "notes.txt"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    export_engine(engine, "triton", output, force=True)
    assert [path.read_text() for path in mine] == ["mine"] * 3
    export_engine(engine, "hub", output, licence="mit", force=True)  # writes no such folders
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert not (model / "config.pbtxt").exists()
    shutil.rmtree(output / REPOSITORY)
    (output / REPOSITORY).write_text("mine")
    with pytest.raises(ArtifactError, match=f"{REPOSITORY} is not edgeseg's and would be replaced"):
        export_engine(engine, "triton", output, force=True)
    (output / REPOSITORY).unlink()
    (output / REPOSITORY / model.name / "config.pbtxt").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="config.pbtxt is not edgeseg's and would be replaced"):
        export_engine(engine, "triton", output, force=True)


@pytest.mark.parametrize(("here", "given"), [(".", "engine"), ("engine", "."), ("engine/within", "..")])
def test_an_export_lies_beside_its_engine(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: str, given: str
) -> None:
    (engine / "within").mkdir()
    monkeypatch.chdir(tmp_path / here)
    result = CliRunner().invoke(cli, ["export", given, "--to", "triton"], catch_exceptions=False)
    assert result.exit_code == 0
    assert (tmp_path / "engine-triton" / REPOSITORY).is_dir()


def test_only_an_export_is_replaced_and_an_engine_that_was_changed_is_none(engine: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export_engine(engine, "triton", output)
    with pytest.raises(OutputExistsError, match="--force"):
        export_engine(engine, "triton", output)
    (output / "mine.txt").write_text("kept")
    export_engine(engine, "hub", output, licence="mit", force=True)
    assert not (output / REPOSITORY).exists()
    assert (output / "mine.txt").read_text() == "kept"
    with pytest.raises(ArtifactError, match="not what edgeseg would write there"):
        export_engine(engine, "triton", engine, force=True)
    graph = engine / read_manifest(engine).graph.name
    graph.write_bytes(graph.read_bytes() + b"\0")
    with pytest.raises(EdgesegError):
        export_engine(engine, "triton", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_verb_says_what_to_do_next(engine: Path) -> None:
    done = CliRunner().invoke(cli, ["export", str(engine), "--to", "triton"])
    assert done.exit_code == 0, done.output
    output = engine.with_name("engine-triton")
    assert f"tritonserver --model-repository {output / REPOSITORY}" in done.output
    done = CliRunner().invoke(cli, ["export", str(engine), "--to", "hub", "--license", "mit", "--json"])
    assert json.loads(done.output)["host"] == "hub"
