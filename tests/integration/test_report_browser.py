"""The HTML report in a real browser: nothing on the console, nothing wider than a phone, both colour schemes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from edgeseg.decide.entries import merge, read_runs
from edgeseg.decide.verdict import decide
from edgeseg.report.html import html

pytestmark = pytest.mark.integration

EXAMPLE = Path(__file__).parents[1] / "data" / "bench-report-example.json"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--hide-scrollbars",
)  # fmt: skip


@pytest.fixture(scope="module")
def chromium() -> str:
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser on PATH (looked for {', '.join(NAMES)})")
    return program


@pytest.fixture(scope="module")
def page() -> str:
    report = merge(read_runs([EXAMPLE]))
    return html(report, decide(report))


def browse(chromium: str, tmp_path: Path, text: str, *arguments: str, width: int = 1280) -> tuple[str, list[str]]:
    """Open a page; returns what the browser printed and its console messages."""
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    profile = tmp_path / "profile"
    done = subprocess.run(
        [chromium, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},900", *arguments, path.as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_nothing_is_said_on_the_console(chromium: str, tmp_path: Path, page: str) -> None:
    dom, console = browse(chromium, tmp_path, page, "--dump-dom")
    assert console == []
    assert "<svg" in dom and "Deploy fpn-int8" in dom


def test_a_page_that_breaks_the_policy_would_be_noticed(chromium: str, tmp_path: Path, page: str) -> None:
    for sin in ('<script>document.title = "ran"</script>', '<img src="https://example.invalid/x.png" alt="">'):
        dom, console = browse(chromium, tmp_path, page.replace("</main>", sin + "</main>"), "--dump-dom")
        assert console, sin
        assert "<title>ran" not in dom


@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_is_wider_than_the_window(chromium: str, tmp_path: Path, page: str, width: int) -> None:
    # A frame has exactly the width it is given, which a window of a headless browser may not. The policy is taken out of
    # this copy of the page, or it could not be asked.
    measured = re.sub(r"<meta http-equiv[^>]*>", "", page)
    ask = "<script>parent.document.title = document.documentElement.scrollWidth + 'x' + innerWidth</script>"
    inner = measured.replace("</body>", ask + "</body>").replace("&", "&amp;").replace('"', "&quot;")
    frame = f'<iframe width="{width}" height="900" style="border:0" srcdoc="{inner}"></iframe>'
    outer = f"<!DOCTYPE html><html><body>{frame}</body></html>"
    dom, _ = browse(chromium, tmp_path, outer, "--dump-dom", "--virtual-time-budget=2000", width=1600)
    sides = re.search(r"<title>(\d+)x(\d+)</title>", dom)
    assert sides is not None
    assert (int(sides[1]), int(sides[2])) == (width, width)


def test_both_colour_schemes_are_drawn(chromium: str, tmp_path: Path, page: str) -> None:
    from PIL import Image

    corners = []
    for scheme in ("0", "1"):
        shot = tmp_path / f"{scheme}.png"
        _, console = browse(
            chromium,
            tmp_path,
            page,
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--screenshot={shot}",
            width=800,
        )
        assert console == []
        with Image.open(shot) as image:
            corners.append(image.convert("L").getpixel((2, 2)))
    assert corners[0] < 60 and corners[1] > 240
