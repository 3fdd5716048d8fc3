"""Every `edgeseg` command in the documentation is one the command line accepts, every file it links to exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from documented import PAGES, ROOT, blocks

from edgeseg.cli.app import VERBS, cli


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page) if block.language == "shell" for line in block.lines]


def service_commands(page: Path) -> list[str]:
    """What a systemd unit or a container runs: ``/path/edgeseg VERB ...``, ``edgeseg:TAG VERB ...``."""
    text = page.read_text(encoding="utf-8")
    return [f"edgeseg {command}" for command in re.findall(r"(?:bin/edgeseg|edgeseg:\w+) ([a-z]+ [^'\n]*)", text)]


SERVICES = [p for folder in ("docs", "docker") for p in sorted((ROOT / folder).glob("*")) if p.is_file()]
SERVICES = [p for p in SERVICES if p.suffix != ".py"]
FOUND = [(page, line) for page in PAGES for line in commands(page)]
FOUND += [(page, line) for page in SERVICES for line in service_commands(page)]
CASES = [pytest.param(line, id=f"{page.relative_to(ROOT)}: {line[:60]}") for page, line in FOUND]


def parse(line: str) -> None:
    arguments = shlex.split(line)[1:]
    context = click.Context(cli)
    command = cli.get_command(context, arguments[0])
    assert command is not None, f"no verb {arguments[0]}"
    command.make_context(arguments[0], arguments[1:], parent=context)


@pytest.mark.parametrize("line", CASES)
def test_documented_command_parses(line: str) -> None:
    parse(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_verbs_named_in_the_text_exist(page: Path) -> None:
    named = set(re.findall(r"`edgeseg ([a-z]+)", page.read_text(encoding="utf-8")))
    assert named <= set(VERBS), f"{page.name} names verbs the command line does not have: {named - set(VERBS)}"


def test_the_readme_is_read_in_a_minute() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 700


def test_services_and_containers_are_checked() -> None:
    checked = {page.name for page, _ in FOUND}
    assert {"jetson.md", "edgeseg.service", "Dockerfile.l4t", "Dockerfile.x86"} <= checked


def test_there_are_commands_to_check_and_a_wrong_one_fails() -> None:
    assert len(CASES) >= 5
    with pytest.raises(click.UsageError):
        parse("edgeseg build --arch fpn --no-such-option")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_make_demo_runs_what_the_readme_says() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in commands(ROOT / "README.md")[:2]:
        words = shlex.split(line)
        recipe = next(r for r in makefile.splitlines() if f"edgeseg {words[1]} " in r)
        missing = [w for w in words[1:] if w not in shlex.split(recipe)]
        assert not missing, missing
