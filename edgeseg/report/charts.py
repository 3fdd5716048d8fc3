"""Charts as inline SVG: no script, no font, no colour of their own (the page's style sheet has both schemes).

Drawn 360 units wide, so that text keeps a readable size on a phone. Marks differ by shape as well as colour; every chart
has a title and a description for screen readers, and its figures stand in a table of the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeseg.errors import imported

if TYPE_CHECKING:
    from markupsafe import Markup
else:
    Markup = imported("markupsafe", "report", "write an HTML report").Markup

WIDTH = 360
STYLES = ("fp32", "fp16", "int8", "baseline", "other")
"""Classes of marks, one per precision; their colours are Okabe and Ito's, their shapes are in :func:`mark`."""
BINS = 48
NUMBERED = 200
"""Up to so many marks have their row's number beside them: of more, none could be read."""
LOG_FROM = 10.0
"""A latency axis that spans more than this factor is logarithmic."""


@dataclass(frozen=True)
class Point:
    """A mark of a scatter chart.

    Attributes:
        number: printed beside the mark; the row's number in the tables.
        label: for the tooltip.
        style: one of :data:`STYLES`.
        x, y: the figures.
        x_interval, y_interval: 95 %, ``None`` where there is none.
    """

    number: int
    label: str
    style: str
    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Samples:
    """A line of the distribution chart: raw samples, milliseconds."""

    number: int
    name: str
    label: str
    style: str
    samples_ms: tuple[float, ...]
    median_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Scale:
    """Maps ``low..high`` to ``start..end``, linearly or by logarithm, and knows round tick values within it."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        return round(self.start + self.share(value) * (self.end - self.start), 2)

    def share(self, value: float) -> float:
        """Where ``value`` lies between ``low`` (0) and ``high`` (1)."""
        if self.is_log:
            return math.log(max(value, self.low * 0.5) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> tuple[float, ...]:
        if self.is_log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            candidates = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
            inside = tuple(tick for tick in candidates if self.low <= tick <= self.high)
            return inside if len(inside) <= 8 else tuple(t for t in inside if f"{t:e}".startswith("1"))
        step = nice_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        return tuple(round(k * step, 10) for k in range(first, math.floor(self.high / step + 1e-9) + 1))


def latency_scale(low: float, high: float, start: float, end: float) -> Scale:
    """A logarithmic axis where latencies differ so much that the fast ones would fall together, else a linear one."""
    return Scale(low, high, start, end, is_log=low > 0 and high / low > LOG_FROM)


def nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below ``rough`` (> 0)."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def scatter(
    points: Sequence[Point],
    lines: Iterable[Sequence[Point]],
    *,
    x_title: str,
    y_title: str,
    title: str,
    key: str,
    from_zero: bool = False,
) -> Markup:
    """Figures against milliseconds, with 95 % intervals and ``lines`` through some of the points. ``key`` makes ids unique,
    ``from_zero`` begins the figures' axis there."""
    height, left, right, top, bottom = 280, 46, 14, 14, 40
    widest = max((p.x_interval or (p.x, p.x))[1] for p in points)
    narrowest = min(min(p.x, (p.x_interval or (p.x, p.x))[0]) for p in points)
    x = latency_scale(0.85 * narrowest, 1.12 * max(widest, 1e-3), left, WIDTH - right)
    if x.is_log:
        x_title += ", logarithmic"
    else:
        x = Scale(0.0, x.high, x.start, x.end)
    lows = [min(p.y, (p.y_interval or (p.y, p.y))[0]) for p in points]
    highs = [max(p.y, (p.y_interval or (p.y, p.y))[1]) for p in points]
    if from_zero:
        lows, highs = [0.0, *lows], [0.0, *highs]
    room = max((max(highs) - min(lows)) * 0.12, 0.002)
    y = Scale(min(lows) - (0.0 if from_zero else room), max(highs) + room, height - bottom, top)
    parts = [*_grid(x, y, height - bottom), *_axis_titles(x_title, y_title, height)]
    parts += [
        Markup('<polyline class="front" points="{}"/>').format(" ".join(f"{x(p.x)},{y(p.y)}" for p in line))
        for line in lines
        if len(line) > 1
    ]
    placed: list[tuple[float, float]] = []
    for point in points:
        px, py = x(point.x), y(point.y)
        group = [Markup("<title>{}</title>").format(point.label)]
        if point.x_interval:
            group.append(_bar(x(point.x_interval[0]), py, x(point.x_interval[1]), py))
        if point.y_interval:
            group.append(_bar(px, y(point.y_interval[0]), px, y(point.y_interval[1])))
        group.append(mark(point.style, px, py))
        parts.append(Markup('<g class="mark {}">{}</g>').format(_style(point.style), Markup().join(group)))
    # Numbers last, and clear of every mark: one that is drawn later would hide them.
    marks = [(x(p.x), y(p.y)) for p in points]
    for point, (px, py) in zip(points, marks, strict=True) if len(points) <= NUMBERED else ():
        tx, ty = _free_place(px, py, placed, marks, WIDTH - right)
        placed.append((tx, ty))
        parts.append(Markup('<text class="number" x="{}" y="{}">{}</text>').format(tx, ty, point.number))
    described = "; ".join(f"{p.number}: {p.label}" for p in points)
    return _svg(parts, height, title, described, key)


def distribution(lines: Sequence[Samples], *, title: str, key: str) -> Markup:
    """A small histogram per row on one common axis, with its median and p99. Samples beyond the axis are counted in
    words, not drawn."""
    left, right, top, lane, bottom = 26, 14, 6, 40, 40
    height = top + lane * len(lines) + bottom
    low = 0.92 * min(min(line.samples_ms) for line in lines)
    # One stall of a second must not squeeze everything else into the first bin.
    high = 1.06 * max(min(max(line.samples_ms), 1.5 * line.p99_ms) for line in lines)
    x = latency_scale(low, max(high, low + 1e-3), left, WIDTH - right)
    base = height - bottom
    parts = [
        Markup(
            '<line class="grid" x1="{0}" y1="{1}" x2="{0}" y2="{2}"/><text x="{0}" y="{3}" class="tick mid">{4}</text>'
        ).format(x(tick), top, base, base + 13, f"{tick:g}")
        for tick in x.ticks()
    ]
    parts.append(
        Markup('<text x="{}" y="{}" class="axis mid">{}</text>').format(
            (left + WIDTH - right) / 2, height - 6, "milliseconds, logarithmic" if x.is_log else "milliseconds"
        )
    )
    for k, line in enumerate(lines):
        floor = top + lane * (k + 1) - 3
        bars = _histogram(line.samples_ms, x, floor, lane - 12)
        beyond = sum(sample > high for sample in line.samples_ms)
        group = [
            Markup("<title>{}</title>").format(line.label),
            Markup('<path class="area" d="{}"/>').format(bars),
            Markup('<line class="base" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(left, floor, WIDTH - right, floor),
            Markup('<text class="number end" x="{}" y="{}">{}</text>').format(left - 6, floor - 6, line.number),
            Markup('<line class="median" x1="{0}" y1="{1}" x2="{0}" y2="{2}"/>').format(
                x(line.median_ms), floor - lane + 12, floor + 2
            ),
        ]
        if line.p99_ms <= high:
            group.append(
                Markup('<line class="p99" x1="{0}" y1="{1}" x2="{0}" y2="{2}"/>').format(
                    x(line.p99_ms), floor - lane + 16, floor + 2
                )
            )
        # The name stands on the side the samples leave free.
        on_left = x(line.median_ms) > (left + WIDTH - right) / 2
        group.append(
            Markup('<text class="name{}" x="{}" y="{}">{}</text>').format(
                "" if on_left else " end",
                left + 3 if on_left else WIDTH - right,
                floor - lane + 22,
                line.name if len(line.name) <= 28 else line.name[:27] + "\u2026",
            )
        )
        if beyond:
            group.append(
                Markup('<text class="tick end" x="{}" y="{}">{} beyond</text>').format(WIDTH - right, floor - 8, beyond)
            )
        parts.append(Markup('<g class="mark {}">{}</g>').format(_style(line.style), Markup().join(group)))
    described = "; ".join(f"{line.number}: {line.label}" for line in lines)
    return _svg(parts, height, title, described, key)


def bar(parts: Sequence[tuple[str, float]], full: float, *, tick: float | None = None) -> Markup:
    """A bar in a table cell: stacked ``(class, length)`` parts of ``full``, and a mark at ``tick``. The cell beside it
    has the figures, so readers that cannot see skip it."""
    place, shapes = 0.0, []
    for style, length in parts:
        width = round(100 * max(length, 0.0) / full, 2) if full > 0 else 0.0
        shapes.append(
            Markup('<rect class="{}" x="{}" y="2" width="{}" height="12"/>').format(style, round(place, 2), width)
        )
        place += width
    if tick is not None and full > 0:
        at = round(100 * tick / full, 2)
        shapes.append(
            Markup('<rect class="tickmark" x="{}" y="0" width="1.2" height="16"/>').format(max(at - 0.6, 0.0))
        )
    return Markup(
        '<svg class="bar" viewBox="0 0 100 16" preserveAspectRatio="none" aria-hidden="true" focusable="false">{}</svg>'
    ).format(Markup().join(shapes))


def mark(style: str, x: float, y: float) -> Markup:
    """The shape of a precision: circle fp32, square fp16, triangle int8, diamond baseline, cross other."""
    size = 5.5
    if style == "fp32":
        return Markup('<circle class="shape" cx="{}" cy="{}" r="{}"/>').format(x, y, size - 0.5)
    if style == "fp16":
        return Markup('<rect class="shape" x="{}" y="{}" width="{s}" height="{s}"/>').format(
            round(x - size + 1, 2), round(y - size + 1, 2), s=2 * size - 2
        )
    corners = {
        "int8": ((0, -6.5), (6, 4.5), (-6, 4.5)),
        "baseline": ((0, -7), (7, 0), (0, 7), (-7, 0)),
    }.get(style, ((-5, -5), (0, -2), (5, -5), (2, 0), (5, 5), (0, 2), (-5, 5), (-2, 0)))
    points = " ".join(f"{round(x + dx, 2)},{round(y + dy, 2)}" for dx, dy in corners)
    return Markup('<polygon class="shape" points="{}"/>').format(points)


def legend_mark(style: str) -> Markup:
    """A mark by itself, to stand in text before its name."""
    return Markup(
        '<svg class="legend-mark" viewBox="0 0 16 16" aria-hidden="true"><g class="mark {}">{}</g></svg>'
    ).format(_style(style), mark(style, 8, 8))


def _style(style: str) -> str:
    return style if style in STYLES else "other"


def _histogram(samples: Sequence[float], x: Scale, floor: float, height: float) -> str:
    """An SVG path of bars from equal bins over the axis."""
    counts = [0] * BINS
    for sample in samples:
        k = math.floor(x.share(sample) * BINS)
        if 0 <= k < BINS:
            counts[k] += 1
    most = max(counts) or 1
    path = []
    for k, count in enumerate(counts):
        if count:
            # A single slow call must stay visible beside a tall peak.
            tall = max(height * count / most, 1.5)
            x0, x1 = (round(x.start + share * (x.end - x.start) / BINS, 2) for share in (k, k + 1))
            path.append(f"M{x0} {floor}V{round(floor - tall, 2)}H{x1}V{floor}Z")
    return "".join(path)


def _grid(x: Scale, y: Scale, base: float) -> Iterable[Markup]:
    # Accuracies are shares, images a second are not.
    digits = max(2 if y.high < 10 else 0, -math.floor(math.log10(nice_step((y.high - y.low) / 5))))
    for tick in y.ticks():
        yield Markup(
            '<line class="grid" x1="{1}" y1="{0}" x2="{2}" y2="{0}"/><text class="tick end" x="{3}" y="{4}">{5}</text>'
        ).format(y(tick), x.start, x.end, x.start - 4, y(tick) + 3.5, f"{tick:.{digits}f}")
    for tick in x.ticks():
        yield Markup(
            '<line class="grid" x1="{0}" y1="{1}" x2="{0}" y2="{2}"/><text class="tick mid" x="{0}" y="{3}">{4}</text>'
        ).format(x(tick), y.end, base, base + 13, f"{tick:g}")


def _axis_titles(x_title: str, y_title: str, height: float) -> Iterable[Markup]:
    yield Markup('<text class="axis mid" x="{}" y="{}">{}</text>').format(WIDTH / 2 + 16, height - 8, x_title)
    yield Markup('<text class="axis" x="2" y="10">{}</text>').format(y_title)


def _bar(x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="interval" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(x1, y1, x2, y2)


def _free_place(
    x: float, y: float, placed: Sequence[tuple[float, float]], marks: Sequence[tuple[float, float]], limit: float
) -> tuple[float, float]:
    """A place for a number beside its mark where no other number and no mark stands."""
    for dx, dy in (
        (8, -6),
        (8, 13),
        (-16, -6),
        (-16, 13),
        (8, -17),
        (8, 24),
        (-16, -17),
        (-16, 24),
        (-4, -12),
        (-4, 19),
    ):
        tx, ty = round(x + dx, 2), round(y + dy, 2)
        free_of_numbers = all(abs(tx - ox) > 13 or abs(ty - oy) > 10 for ox, oy in placed)
        free_of_marks = all(abs(tx + 5 - mx) > 10 or abs(ty - 4 - my) > 8 for mx, my in marks)
        if 46 <= tx <= limit - 12 and free_of_numbers and free_of_marks:
            return tx, ty
    return round(x + 8, 2), round(y - 6, 2)


def _svg(parts: Iterable[Markup], height: float, title: str, described: str, key: str) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-labelledby="{k}-t {k}-d">'
        '<title id="{k}-t">{}</title><desc id="{k}-d">{}</desc>{}</svg>'
    ).format(WIDTH, height, title, described, Markup().join(parts), k=key)
