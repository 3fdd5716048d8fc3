"""What the demo scenes are drawn with: a camera, a canvas that keeps class and depth beside colour, noise."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

CLASS_NAMES = ("sky", "road", "building", "vegetation", "car", "person", "pole", "sign")
SKY, ROAD, BUILDING, VEGETATION, CAR, PERSON, POLE, SIGN = range(8)

Pixels = NDArray[np.float32]
Mask = NDArray[np.uint8]
Colour = tuple[float, float, float]
T = TypeVar("T")


@dataclass(frozen=True)
class Light:
    """What the hour and the weather do to a scene."""

    zenith: Colour
    horizon: Colour
    ambient: float  # brightness of everything on the ground
    sun: float  # -1 from the left, 1 from the right, 0 diffuse
    shadow: float  # darkness of cast shadows, 0..1
    lit: float  # share of windows with the light on
    haze: float  # extinction per metre
    tint: Colour
    noise: float


@dataclass(frozen=True)
class Camera:
    """A pinhole camera looking along z, level."""

    focal: float
    x: float  # vanishing point
    y: float  # horizon
    height: float  # metres above the road

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        return self.x + self.focal * x / z, self.y + self.focal * (self.height - y) / z


class Canvas:
    """Colour, class and depth of what has been painted so far; later paint hides earlier."""

    def __init__(self, height: int, width: int) -> None:
        self.colour: Pixels = np.zeros((height, width, 3), np.float32)
        self.label: Mask = np.zeros((height, width), np.uint8)
        self.depth: Pixels = np.full((height, width), 1e4, np.float32)

    def window(self, x0: float, y0: float, x1: float, y1: float) -> tuple[slice, slice, Pixels, Pixels] | None:
        """The pixels touching a box, and their centres; None when the box is out of view."""
        height, width = self.label.shape
        left, right = max(0, int(x0) - 1), min(width, int(x1) + 2)
        top, bottom = max(0, int(y0) - 1), min(height, int(y1) + 2)
        if left >= right or top >= bottom:
            return None
        xs = np.arange(left, right, dtype=np.float32) + np.float32(0.5)
        ys = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5)
        return slice(top, bottom), slice(left, right), xs, ys

    def paint(
        self,
        rows: slice,
        cols: slice,
        coverage: Pixels,
        colour: Colour | Pixels,
        label: int | None,
        z: float | Pixels,
    ) -> None:
        area = self.colour[rows, cols]
        area += (np.asarray(colour, np.float32) - area) * coverage[..., None]
        if label is not None:  # None: a decal, which keeps the class and depth of what it lies on
            hit = coverage >= 0.5
            self.label[rows, cols][hit] = label
            np.copyto(self.depth[rows, cols], np.asarray(z, np.float32), where=hit)

    def polygon(
        self,
        points: Sequence[tuple[float, float]],
        colour: Colour,
        label: int | None,
        z: float,
        fade: float = 0.0,
    ) -> None:
        """A convex polygon, darkening by `fade` from its top to its bottom."""
        xs_, ys_ = [p[0] for p in points], [p[1] for p in points]
        found = self.window(min(xs_), min(ys_), max(xs_), max(ys_))
        if found is None:
            return
        rows, cols, xs, ys = found
        area = sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(points, [*points[1:], points[0]], strict=True))
        sign = 1.0 if area > 0 else -1.0
        inside: Pixels | None = None
        for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
            length = ((bx - ax) ** 2 + (by - ay) ** 2) ** 0.5
            if length < 1e-6:
                continue
            k = np.float32(sign / length)
            edge = (ys - np.float32(ay)) * (np.float32(bx - ax) * k) - (xs - np.float32(ax)) * (np.float32(by - ay) * k)
            inside = edge if inside is None else np.minimum(inside, edge)
        if inside is None:
            return
        paint: Colour | Pixels = colour
        if fade:
            ramp = 1.0 - fade * np.clip((ys - min(ys_)) / max(max(ys_) - min(ys_), 1.0), 0, 1)
            paint = (ramp[..., None] * np.asarray(colour, np.float32)).astype(np.float32)
        self.paint(rows, cols, np.clip(inside + np.float32(0.5), 0, 1), paint, label, z)

    def ellipse(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        colour: Colour,
        label: int | None,
        z: float,
        soft: float = 0.0,
    ) -> None:
        """An ellipse; `soft` spreads its edge over that share of the radius."""
        found = self.window(x - rx, y - ry, x + rx, y + ry)
        if found is None:
            return
        rows, cols, xs, ys = found
        rx, ry = max(rx, 0.5), max(ry, 0.5)
        radius = np.sqrt(((xs - np.float32(x)) / np.float32(rx)) ** 2 + ((ys - np.float32(y)) / np.float32(ry)) ** 2)
        slope = np.float32(1 / soft if soft else min(rx, ry))
        self.paint(rows, cols, np.clip((1 - radius) * slope + np.float32(0 if soft else 0.5), 0, 1), colour, label, z)

    def stroke(
        self,
        x0: float,
        y0: float,
        x1: float,
        y1: float,
        width: float,
        colour: Colour,
        label: int | None,
        z: float,
    ) -> None:
        """A straight line with round ends, never thinner than a pixel: a thing seen is a thing labelled."""
        r = max(width, 1.0) / 2
        found = self.window(min(x0, x1) - r, min(y0, y1) - r, max(x0, x1) + r, max(y0, y1) + r)
        if found is None:
            return
        rows, cols, xs, ys = found
        dx, dy = np.float32(x1 - x0), np.float32(y1 - y0)
        px, py = xs - np.float32(x0), ys - np.float32(y0)
        t = np.clip((px * dx + py * dy) / max(float(dx * dx + dy * dy), 1e-6), 0, 1).astype(np.float32)
        distance = np.sqrt((px - t * dx) ** 2 + (py - t * dy) ** 2)
        self.paint(rows, cols, np.clip(np.float32(r + 0.5) - distance, 0, 1), colour, label, z)


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """Like rng.choice, on top of random() alone, whose sequence Python guarantees."""
    return options[int(rng.random() * len(options))]


def jitter(rng: random.Random, colour: Colour, amount: float) -> Colour:
    """The colour moved at random, mostly in brightness."""
    common = rng.uniform(-amount, amount)
    r, g, b = (min(1.0, max(0.02, c + common + rng.uniform(-amount, amount) / 2)) for c in colour)
    return r, g, b


def scaled(colour: Colour, factor: float) -> Colour:
    """The colour under `factor` times as much light."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


@functools.lru_cache(maxsize=4)
def fractal(first: int, last: int, seed: int) -> Pixels:
    """512x512 tileable noise in 0..1, octaves of `first`..`last` cells, coarse ones strongest."""
    size, generator = 512, np.random.Generator(np.random.PCG64(seed))
    total, cells, weight = np.zeros((size, size), np.float32), first, 1.0
    while cells <= last:
        grid = generator.random((cells, cells)).astype(np.float32)
        at = np.arange(size, dtype=np.float32) * np.float32(cells / size)
        low, part = at.astype(np.int64), at - np.floor(at)
        high = (low + 1) % cells
        along = grid[:, low] * (1 - part) + grid[:, high] * part
        total += np.float32(weight) * (along[low] * (1 - part[:, None]) + along[high] * part[:, None])
        cells, weight = cells * 2, weight * 0.62
    total -= total.min()
    result: Pixels = (total / total.max()).astype(np.float32)
    return result


def sample(noise: Pixels, u: Pixels, v: Pixels) -> Pixels:
    """Noise at texel (v, u), wrapping."""
    picked: Pixels = noise[v.astype(np.int32) & 511, u.astype(np.int32) & 511]
    return picked
