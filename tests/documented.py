"""The commands and programs that README and docs show, and which of them a test runs.

An HTML comment ``<!-- not run: reason -->`` above a block says why nobody can run it here (a device, the reader's own files).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("*/README.md")),
)
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")


@dataclass(frozen=True)
class Block:
    """Consecutive lines of one page that belong together: shell commands, or one Python program.

    Attributes:
        lines: commands, continued lines joined; or the program's text as one.
        reason: why it is not run; ``None`` for one that is.
    """

    page: Path
    language: str
    lines: tuple[str, ...]
    reason: str | None


def blocks(page: Path) -> list[Block]:
    """The blocks of ``page`` that show ``edgeseg`` commands or Python, in order."""
    result: list[Block] = []
    reason: str | None = None
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    whole = re.sub(r"```.*?```", lambda m: re.sub(r"\n\s*\n", "\n", m[0]), text, flags=re.DOTALL)
    for part in re.split(r"\n\s*\n", whole):
        if said := _NOT_RUN.search(part):
            reason = said[1]
        program = re.search(r"```python\n(.*?)```", part, flags=re.DOTALL)
        shell = tuple(
            re.sub(r"\s+#.*", "", line).strip() for line in re.findall(r"^ {4,}(edgeseg [a-z]+.*)$", part, re.MULTILINE)
        )
        if program is not None:
            result.append(Block(page, "python", (program[1],), reason))
        elif shell:
            result.append(Block(page, "shell", shell, reason))
        is_block = program is not None or part.startswith("    ") or "\n    " in part
        if is_block and not _NOT_RUN.fullmatch(part.strip()):
            reason = None
    return result
