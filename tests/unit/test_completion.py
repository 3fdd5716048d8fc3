"""Shell completion, asked as the shells ask, and once through bash itself; the commands of the CI example are ones that exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from click.shell_completion import get_completion_class

from edgeseg.cli import completion
from edgeseg.cli.app import cli

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("edgeseg b", ["plain,build", "plain,bench"]),
        ("edgeseg build --prec", ["plain,--precision"]),
        ("edgeseg build --precision in", ["plain,int8"]),
        ("edgeseg build --arch deep", ["plain,deeplabv3", "plain,deeplabv3plus"]),
        ("edgeseg build --weights my", ["file,my"]),
        ("edgeseg build --calibration my", ["file,my"]),
        ("edgeseg run engines/a --fit l", ["plain,letterbox"]),
        ("edgeseg run eng", ["file,eng"]),
        ("edgeseg run engines/a photos/a.jpg ph", ["file,ph"]),
        ("edgeseg calibrate ph", ["file,ph"]),
        ("edgeseg export engines/a --to j", ["plain,jetson-inference"]),
        ("edgeseg nonsense b", ["plain,build", "plain,bench"]),
    ],
)
def test_what_a_word_can_become(words: str, answer: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    asked = completion.Bash(cli, {}, "edgeseg", "_EDGESEG_COMPLETE")
    assert sorted(asked.complete().splitlines()) == sorted(answer)


@pytest.mark.parametrize(
    ("shell", "words", "word", "answer"),
    [
        ("bash", "edgeseg build --arch = segf", "4", "plain,segformer"),
        ("zsh", "edgeseg build --arch=segf", "2", "plain\n--arch=segformer\n_"),
        ("fish", "edgeseg build --arch=segf", "--arch=segf", "plain,--arch=segformer"),
        ("fish", "edgeseg bui", "bui", "plain,build\tConvert; quantize; build and verify an engine."),
    ],
)
def test_each_shell_is_told_in_its_own_way(
    shell: str, words: str, word: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", word)
    chosen = get_completion_class(shell)
    assert chosen is not None
    assert chosen(cli, {}, "edgeseg", "_EDGESEG_COMPLETE").complete() == answer


# What of a shell that completes is done by its own machinery, which runs at a terminal only, is stood in for.
IN_SHELLS = {
    "bash": 'eval "$(_EDGESEG_COMPLETE=bash_source edgeseg)"; COMP_WORDS=(edgeseg doc); COMP_CWORD=1; '
    '_edgeseg_completion edgeseg; echo "${COMPREPLY[@]}"',
    "zsh": 'compdef() {}; _describe() { print -r -- ${${(P)3}%%:*} }; eval "$(_EDGESEG_COMPLETE=zsh_source edgeseg)"; '
    "words=(edgeseg doc); CURRENT=2; _edgeseg_completion",
    "fish": "_EDGESEG_COMPLETE=fish_source edgeseg | source; string split -f 1 \\t (complete -C 'edgeseg doc')",
}


@pytest.mark.parametrize("shell", IN_SHELLS)
def test_shells_complete(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    program = tmp_path / "edgeseg"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m edgeseg "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([shell, "-c", IN_SHELLS[shell]], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "doctor"


def test_the_commands_of_the_ci_example_are_understood() -> None:
    text = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(), flags=re.DOTALL)
    assert text is not None
    steps = yaml.safe_load(text[1])["jobs"]["deploy"]["steps"]
    commands = [shlex.split(step["run"]) for step in steps if step.get("run", "").startswith("edgeseg ")]
    assert [command[1] for command in commands] == ["build", "bench", "report"]
    for _, verb, *arguments in commands:
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None
        command.make_context(verb, arguments)
    assert "--require" in commands[-1]


def test_the_page_for_agents_names_what_there_is() -> None:
    page = (ROOT / "AGENTS.md").read_text()
    assert len(page.splitlines()) < 60
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^    make ([a-z]+)", page, flags=re.MULTILINE)) <= targets
    paths = [name for name in re.findall(r"`([\w./-]+)`", page) if "/" in name and "{" not in name]
    assert [name for name in paths if not (ROOT / name).exists() and not name.startswith(".venv")] == []
