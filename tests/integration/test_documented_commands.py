"""What README and docs tell a reader to type does what they say: page by page, each in a folder of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from documented import PAGES, ROOT, Block, blocks

pytestmark = pytest.mark.integration

RUN = {page: [block for block in blocks(page) if block.reason is None] for page in PAGES}


# What a reader measures three times and for longer.
QUICKLY = ("--fresh-processes", "1", "--duration-s", "1")


@pytest.mark.parametrize("page", [p for p in PAGES if RUN[p]], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_blocks_of_the_page(page: Path, tmp_path: Path) -> None:
    # A fresh checkout, as far as a reader needs it.
    (tmp_path / "calibration").symlink_to(ROOT / "calibration")
    for block in RUN[page]:
        for command in commands(block):
            done = subprocess.run(
                [sys.executable, *command],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=500,
                check=False,
            )
            # On a busy machine "cannot tell, measure longer" is the right answer of a report, with a code of its own.
            allowed = (0, 3) if "report" in command else (0,)
            assert done.returncode in allowed, f"{command}\n{done.stderr}"


def commands(block: Block) -> list[list[str]]:
    if block.language == "python":
        return [["-c", line] for line in block.lines]
    words = [shlex.split(line)[1:] for line in block.lines]
    return [["-m", "edgeseg", *line, *(QUICKLY if line[0] == "bench" else ())] for line in words]


def test_the_readme_and_the_tutorial_are_among_them() -> None:
    assert len(RUN[ROOT / "README.md"]) >= 2
    assert len(RUN[ROOT / "docs" / "tutorial.md"]) >= 5
