"""What README and docs tell a reader to type does what they say: page by page, each in a folder of its own."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from command_line import typed
from documented import PAGES, ROOT, blocks

pytestmark = pytest.mark.integration

RUN = {page: [block for block in blocks(page) if block.reason is None] for page in PAGES}


# What a reader measures three times and for longer.
QUICKLY = ("--fresh-processes", "1", "--duration-s", "1")


@pytest.mark.parametrize("page", [p for p in PAGES if RUN[p]], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_blocks_of_the_page(page: Path, small_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A fresh checkout, as far as a reader needs it.
    (tmp_path / "calibration").symlink_to(small_demo.parent)
    monkeypatch.setattr("edgeseg.pipeline.verification_data.sample_folder", lambda: small_demo)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for block in RUN[page]:
        for line in block.lines:
            if block.language == "python":
                exec(compile(line, page.name, "exec"), {"__name__": "__main__"})
                continue
            verb, *words = shlex.split(line)[1:]
            done = typed(verb, *words, *(QUICKLY if verb == "bench" else ()))
            # On a busy machine "cannot tell, measure longer" is the right answer of a report, with a code of its own.
            assert done.returncode in ((0, 3) if verb == "report" else (0,)), f"{line}\n{done.stderr}"


def test_the_readme_and_the_tutorial_are_among_them() -> None:
    assert len(RUN[ROOT / "README.md"]) >= 2
    assert len(RUN[ROOT / "docs" / "tutorial.md"]) >= 5
