"""The command line: exit codes, one-line errors, nothing heavy imported for help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import imported, typed
from engine_folders import write_manifest

import edgeseg
from edgeseg.arguments import parse_settings
from edgeseg.cli.app import VERBS
from edgeseg.errors import InputError, SpecError
from edgeseg.pipeline.request import BuildRequest
from edgeseg.spec import InputSpec, ModelSpec, PipelineSpec

ROOT = Path(__file__).parents[2]
PHOTO = str(ROOT / "calibration" / "demo" / "val" / "images" / "000.jpg")


def test_help_lists_every_verb_and_imports_nothing_heavy() -> None:
    printed = imported(["--help"], {"torch", "onnx", "onnxruntime", "numpy", "rich", "PIL"})
    assert all(verb in printed for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    done = typed(verb, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: edgeseg")


def test_python_m_edgeseg_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "edgeseg", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"edgeseg, version {edgeseg.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["biuld"], 2, "did you mean 'build'"),
        (["build", "--precision", "int4"], 2, "int4"),
        (["build", "--arch", "fpn", "--batch", "0"], 2, "MIN"),
        (["build", "--arch", "fpn", "--size", "big"], 2, "HEIGHTxWIDTH"),
        (["build", "--arch", "fpn", "--mean", "a,b"], 2, "list of numbers"),
        (["build", "--arch", "fpn", "--max-drop", "7"], 2, "between 0 and 1"),
        (["build", "--arch", "fpn", "--model-arg", "depth"], 2, "key=value"),
        (["export", "engine"], 2, "edgeseg: Missing option '--to'. Choose from: triton, hub, "),
        (["inspect", "no-such-folder"], 1, "no such folder"),
        (["run", "no-such-folder", PHOTO, "--output", "out"], 1, "no such folder"),
        (["compile", "no-such-folder"], 1, "no such folder"),
        (["bench", "no-such-folder"], 1, "no such folder"),
        (["bench", "x", "--batch", "1,0"], 2, "different counts"),
        (["bench", "x", "--baseline", "keras"], 2, "keras"),
        (["bench", "x", "--duration-s", "nan"], 2, "duration_s is 'nan'; give seconds"),
        (["bench", "x", "--ignore-index", "9" * 400], 2, "give a whole number from"),
        (["bench", "x", "--limit", "9" * 5000], 2, "give a whole number from 1"),
        (["bench", "x", "--batch", "4611686018427387904"], 2, "different counts"),
        (["build", "--arch", "fpn", "--classes", "9" * 400], 2, "give a whole number from 1 to 65535"),
        (["build", "--arch", "fpn", "--size", "4611686018427387904"], 2, "HEIGHTxWIDTH"),
        (["build", "--arch", "fpn", "--model-arg", "x=" + "[" * 100_000], 2, "nested too deep"),
        (["calibrate", "photos", "--arch", "fpn", "--output", "t.txt"], 2, "t.txt; a table is a .json file"),
        (["compare", "old.json", "new.json"], 1, "cannot read bench report old.json"),
        (["compare", "old.json", "new.json", "--max-regression", "fps=3"], 2, "unknown metric 'fps'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], code: int, message: str) -> None:
    done = typed(*arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "", PHOTO, "--output", "out"], "Invalid value for 'ENGINE_DIR': it is empty; give a path"),
        (["run", "engine", "", "--output", "out"], "Invalid value for 'INPUT...': inputs is ''; give a path or a name"),
        (["run", "engine", PHOTO, "--output", ""], "Invalid value for '--output': it is empty; give a path"),
        (["bench", "engine", "--data", ""], "Invalid value for '--data': data is ''; give a path"),
        (["build", "--arch", "fpn", "--calibration", ""], "calibration is ''; give a folder, a glob, a list"),
        (["build", "--arch", "fpn", "--weights", ""], "weights is ''; give a path or a name"),
        (["build", "--arch", "fpn", "--encoder", ""], "encoder is ''; give a name"),
        (["build", "--arch", "fpn", "--calibration-method", ""], "calibration_method is ''; give a name"),
        (["build", "--arch", "fpn", "--class-names", ""], "class_names is ''; give names, such as road,sky"),
        (["bench", "engine", "--split", ""], "split is ''; give a name"),
    ],
)
def test_a_variable_of_the_shell_that_is_not_set_is_not_the_folder_one_is_in_nor_the_default(
    arguments: list[str], message: str
) -> None:
    done = typed(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "unett"], "unknown architecture 'unett'; did you mean 'unet'"),
        (["--arch", "linknet"], "no demo model for 'linknet'"),
        (["--arch", "unet", "--weights", "random"], "int8 needs calibration images"),
        (["--arch", "unet", "--weights", "{tmp}/none.pt", "--precision", "fp32"], "no such file or folder"),
        (["--arch", "fpn", "--calibration", "{tmp}/none"], "does not exist"),
        (["--arch", "fpn", "--calibration", "{tmp}/none.json"], "none.json does not exist; edgeseg calibrate"),
        (["--arch", "fpn", "--calibration", "{tmp}/empty"], "no images in"),
        (["--arch", "fpn", "--calibration", "{tmp}/few"], "only 1 image in"),
        (["--arch", "fpn", "--validation", "{tmp}/none"], "is not a folder; give one with images/ and masks/"),
        (["--arch", "fpn", "--validation", "{tmp}/empty"], "no images in"),
        (["--arch", "fpn", "--validation", "{tmp}/few", "--max-drop", "0.01"], "--max-drop needs masks"),
        (
            ["--arch", "unet", "--weights", "random", "--precision", "fp32", "--max-drop", "0.1"],
            "--max-drop needs masks",
        ),
        (["--arch", "fpn", "--output", "{tmp}/few"], "exists; give --force"),
        (["--arch", "fpn", "--output", "{tmp}/few", "--force"], "not what edgeseg would write there"),
        (["--arch", "fpn", "--output", "{tmp}/few/a.png", "--force"], "edgeseg replaces engine folders only"),
        (["--arch", "fpn", "--scheme", "onnxruntime-vni"], "did you mean 'onnxruntime-vnni'"),
        (["--arch", "fpn", "--max-drop", "0.1", "--latency-from", "{tmp}/none.json"], "cannot read bench report"),
        (["--arch", "fpn", "--max-drop", "0.1", "--latency-from", "{tmp}/few/a.png"], "a.png is damaged or not one"),
        (["--arch", "fpn", "--calibration-method", "kl"], "unknown calibration method 'kl'"),
        (["--arch", "fpn", "--target", "openvino", "--backend-option", "spinning=false"], "no build option 'spinning'"),
        (["--arch", "fpn", "--backend-option", "thread=2"], "no build option 'thread'; did you mean 'threads'"),
        (["--arch", "fpn", "--target", "tensorrt", "--backend-option", "threads=2"], "no build option 'threads'"),
    ],
)
def test_what_cannot_be_is_refused_before_torch_is_imported(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    for name in ("empty", "few"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "few" / "a.png")

    def refuse(request: object) -> None:
        raise AssertionError("the model is being loaded")

    monkeypatch.setattr("edgeseg.convert.load.load_model", refuse)
    done = typed("build", *(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize("force", [False, True])
def test_calibrate_asks_before_it_replaces_a_table(
    force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table.json"
    table.write_text("mine")
    begun = []

    def begin(request: object, path: Path, reporter: object) -> None:
        begun.append(path)
        raise InputError("the images are being read")

    monkeypatch.setattr("edgeseg.pipeline.calibration.run_calibration", begin)
    done = typed("calibrate", tmp_path, "--arch", "fpn", "--output", table, *["--force"] * force)
    assert table.read_text() == "mine"
    exists = f"edgeseg: {table} exists; give --force to replace it, or another output\n"
    expected = ([table], 1, "edgeseg: the images are being read\n") if force else ([], 2, exists)
    assert (begun, done.returncode, done.stderr) == expected


@pytest.mark.parametrize("given", ["engine", "options"])
def test_figures_replace_nothing_that_they_are_made_of(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of the engine, the checkpoint's folder, the calibration and validation images, the bench report."""
    (tmp_path / "w").mkdir()
    (tmp_path / "v" / "masks").mkdir(parents=True)
    files = ["b.json", "w/config.json", "w/model.safetensors", "c.txt", "i.png", "v/i.png", "v/masks/i.png"]
    for name in files:
        (tmp_path / name).write_text("i.png" if name == "c.txt" else "mine")
    if given == "engine":
        (tmp_path / "e").mkdir()
        for name in ("model.onnx", "engine.onnx"):
            (tmp_path / "e" / name).write_text("mine")
        spec = PipelineSpec(model=ModelSpec("fpn", classes=2), input=InputSpec(64, 64))
        write_manifest(tmp_path / "e", spec, graph="model.onnx", engine="engine.onnx")
        files = ["b.json", "v/i.png", *(f"e/{name}" for name in os.listdir(tmp_path / "e"))]
        request = ["e"]
        monkeypatch.setattr("edgeseg.cli.sensitivity._of_folder", lambda folder, given: BuildRequest.of(given))
    else:
        request = ["--weights", "w", "--calibration", "c.txt"]
    monkeypatch.chdir(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files}
    for name in files:
        options = ["--data", "v", "--latency-from", "b.json", "--json", name, "--force"]
        done = typed("sensitivity", *request, *options)
        assert done.returncode == 2
        assert "would replace the input" in done.stderr
    assert {name: (tmp_path / name).read_bytes() for name in files} == before
    done = typed("calibrate", ".", "--arch", "fpn", "--output", "i.png", "--force")
    assert (done.returncode, (tmp_path / "i.png").read_text()) == (2, "mine")


def test_a_refused_build_has_not_imported_torch() -> None:
    words = ["build", "--arch", "fpn", "--max-drop", "0.1", "--calibration", "no"]
    imported(words, {"torch", "timm", "segmentation_models_pytorch", "onnxruntime", "openvino"}, 1)


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in typed("inspect", "no-such-folder", "--debug").stderr


def test_doctor_prints_only_json_with_json() -> None:
    done = typed("doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)


def test_key_values() -> None:
    pairs = ("depth=4", "channels=[64,32]", "kind=scse", "batchnorm=True", "x=None", 'name="a=b"')
    assert parse_settings(pairs) == {
        "depth": 4,
        "channels": [64, 32],
        "kind": "scse",
        "batchnorm": True,
        "x": None,
        "name": "a=b",
    }
    for bad in (("depth",), ("=4",), ("a=1", "a=2")):
        with pytest.raises(SpecError):
            parse_settings(bad)


def test_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """rich takes [void] for a style and drops it; extras and class names have brackets."""
    from rich.table import Table

    from edgeseg.cli.output import result_console

    table = Table("name")
    table.add_row("pip install 'edgeseg[tensorrt]' [bold]x")
    result_console().print(table)
    assert "edgeseg[tensorrt]' [bold]x" in capsys.readouterr().out


HOSTILE = "a\x1b]0;owned\x07\x1b[31mb\u202ec\nd\x9be"


def test_nothing_a_terminal_would_obey_reaches_it(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    from edgeseg.cli.output import console_reporter, echo, print_json, result_console

    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE))
    result_console().print(table, Text(f"note: {HOSTILE}"), HOSTILE, soft_wrap=True)
    echo(HOSTILE)
    echo(HOSTILE, err=True)
    print_json({HOSTILE: [HOSTILE, "\udcff"]})
    with console_reporter() as reporter:
        reporter.start(HOSTILE)
        reporter.note(HOSTILE)
        reporter.finish(HOSTILE, 1.0)
    for said in capsys.readouterr():
        assert not set(said) & {"\x1b", "\x07", "\u202e", "\x9b"}, said
        assert "\\x1b" in said and "\\u202e" in said
    assert len(said.splitlines()) == 3, said


def test_an_error_with_escapes_stays_one_line(tmp_path: Path) -> None:
    done = typed("inspect", tmp_path / HOSTILE)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "\\x1b]0;owned\\x07" in done.stderr
    assert "\x1b" not in typed("build", "--precision", HOSTILE, "--json").stderr


def test_people_see_their_own_alphabet() -> None:
    from edgeseg.console import printable

    for text in ("café — 道路 دوچرخه‌سوار 👩‍🌾", "C:\\data [void] edgeseg[tensorrt]"):
        assert printable(text) == text


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["inspect", "no-such-folder", "--json"], 1, "ArtifactError"),
        (["build", "--arch", "unett", "--json"], 2, "SpecError"),
        (["build", "--json", "--size", "big"], 2, "BadParameter"),
        (["compile", "--json"], 2, "MissingParameter"),
        (["bench", "no-such-folder", "--json", "-"], 1, "ArtifactError"),
        (["sensitivity", "no-such-folder", "--json", "-"], 1, "ArtifactError"),
    ],
)
def test_json_in_every_end(arguments: list[str], code: int, kind: str) -> None:
    done = typed(*arguments)
    assert done.returncode == code
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == kind
    assert error["message"] in done.stderr


@pytest.mark.parametrize("verb", ["bench", "sensitivity"])
def test_json_that_goes_to_a_file_is_not_printed(verb: str) -> None:
    done = typed(verb, "no-such-folder", "--json", "never-written.json")
    assert (done.returncode, done.stdout) == (1, "")


def test_an_unmet_gate_gives_its_figures_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    from edgeseg.cli.app import _Ending
    from edgeseg.errors import GateError

    ending = _Ending.of(GateError("the engine loses 0.0200 mIoU", {"agreement": 0.5}))
    ending.tell(as_json=True)
    assert json.loads(capsys.readouterr().out) == {
        "error": {"kind": "GateError", "message": "the engine loses 0.0200 mIoU"},
        "figures": {"agreement": 0.5},
    }
    assert ending.code == 3


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("--help > /dev/full", 1, "No space left on device"),
        ("doctor > /dev/full", 1, "cannot read or write: No space left on device"),
        ("doctor --json > /dev/full", 1, "No space left on device"),
        ("doctor | true", 130, ""),
        ("inspect $(printf 'x%.0s' $(seq 300))", 1, "File name too long"),
        ("doctor >&-", 0, ""),
    ],
)
def test_what_the_system_refuses_is_one_line(command: str, code: int, message: str) -> None:
    shell = f"set -o pipefail; {sys.executable} -m edgeseg {command}"
    done = subprocess.run(
        ["bash", "-c", shell], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False, env={**os.environ}
    )
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == (1 if message else 0)
    assert "internal error" not in done.stderr


def test_a_working_folder_that_is_gone(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')\n"
        "sys.argv = ['edgeseg', 'build', '--arch', 'fpn']\n"
        "from edgeseg.cli import main; main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "edgeseg: the working folder is not there any more; go to another\n"


@pytest.mark.parametrize(("words", "code"), [("--version", 0), ("no-such-verb", 2)])
@pytest.mark.parametrize("imported", [True, False])
def test_a_process_that_imported_torch_does_not_take_it_apart(words: str, code: int, imported: bool) -> None:
    program = (
        "import sys, types\n"
        "class Large:\n    def __del__(self): print('freed')\n"
        f"if {imported}: sys.modules['torch'] = types.ModuleType('torch')\n"
        f"kept = Large()\nsys.argv = ['edgeseg', {words!r}]\n"
        "from edgeseg.cli import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert ("freed" in done.stdout) is not imported
    assert ("edgeseg, version" in done.stdout) is (code == 0)


def test_ctrl_c_before_the_command_line_is_read_is_one_line() -> None:
    program = (
        "import sys, types\n"
        "class Interrupted(types.ModuleType):\n"
        "    def __getattr__(self, name): raise KeyboardInterrupt\n"
        "sys.modules['click'] = Interrupted('click')\n"
        "from edgeseg.cli import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "edgeseg: interrupted\n")


def test_ctrl_c_while_a_compiled_module_is_imported_is_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their import then fails with an ImportError; nothing is missing."""
    from edgeseg.convert.architectures import import_for_conversion
    from edgeseg.errors import imported

    (tmp_path / "compiled_part.py").write_text("raise ImportError('initialization failed') from KeyboardInterrupt()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        imported("compiled_part", "onnxruntime", "run engines on this CPU")
    with pytest.raises(KeyboardInterrupt):
        import_for_conversion("compiled_part")


def test_printed_commands_can_be_typed() -> None:
    from edgeseg.errors import typed

    assert typed("compile", Path("my engines/it's")) == "edgeseg compile 'my engines/it'\"'\"'s'"
    assert typed("compile", Path("-x")) == "edgeseg compile ./-x"


def test_how_a_command_ended_in_words() -> None:
    from edgeseg.cli.app import _Ending

    for error, code, kind, words in (
        (KeyboardInterrupt(), 130, "Interrupted", "interrupted"),
        (MemoryError(), 1, "MemoryError", "out of memory"),
        (PermissionError(13, "Permission denied", "a b"), 1, "PermissionError", "a b: Permission denied"),
        (KeyError("x"), 1, "InternalError", "this is a bug"),
    ):
        ending = _Ending.of(error)
        assert (ending.code, ending.kind) == (code, kind)
        assert words in ending.message


def test_help_has_the_exit_codes() -> None:
    said = typed("--help").stdout
    assert all(line in said for line in ("0    done", "3    a limit", "130  interrupted"))


def test_the_json_of_every_verb_is_documented() -> None:
    import dataclasses

    from edgeseg.backends import BackendStatus
    from edgeseg.cli.app import EXIT_CODES
    from edgeseg.cli.doctor import Diagnosis, Package
    from edgeseg.cli.inspect import CheckedFile, EngineReport, Layer
    from edgeseg.evaluate.regressions import Change
    from edgeseg.machine.cpu import Cpu
    from edgeseg.machine.reading import Memory
    from edgeseg.runtime.run import Failure, RunSummary

    page = (ROOT / "docs" / "json.md").read_text()
    for heading, kinds in {
        "run": (RunSummary, Failure),
        "inspect": (EngineReport, CheckedFile, Layer),
        "doctor": (Diagnosis, Cpu, Memory, Package, BackendStatus),
        "compare": (Change,),
    }.items():
        section = page.split(f"## `{heading}`\n")[1].split("\n## ")[0]
        named = {field.name for kind in kinds for field in dataclasses.fields(kind)}
        assert {name for name in named if f"`{name}`" not in section} == set(), heading
    assert all(f"| {code} | {meaning.split(',')[0]}" in page for code, meaning in EXIT_CODES.items())
