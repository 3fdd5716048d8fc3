"""What stands in the demo scenes: walls, trees, cars, people, posts."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from demo_canvas import (
    BUILDING,
    CAR,
    PERSON,
    POLE,
    SIGN,
    VEGETATION,
    Camera,
    Canvas,
    Colour,
    Light,
    Pixels,
    fractal,
    jitter,
    pick,
    sample,
    scaled,
)


@dataclass(frozen=True)
class Facade:
    """How a house looks from the street."""

    wall: Colour
    floor: float  # metres from storey to storey
    pitch: float  # metres from window to window
    glass: float  # share of wall that is window
    shop: Colour | None
    key: int

    def shade(self, u: Pixels, v: Pixels, pixel: Pixels, light: Light) -> Pixels:
        """Colour at u metres along (one a column) and v metres up the wall; a pixel spans `pixel` metres."""
        detail = np.clip(self.pitch / (3 * pixel), 0, 1)  # windows smaller than a pixel would only alias
        iu, iv = np.floor(u / np.float32(self.pitch)), np.floor(v / np.float32(self.floor))
        fu, fv = u / np.float32(self.pitch) - iu, v / np.float32(self.floor) - iv
        tone = 0.75 + 0.5 * sample(fractal(4, 128, 1), u * 11 + self.key, v * 7)
        if pixel.min() < 0.15:
            tone += (sample(fractal(32, 256, 2), u * 50, v * 70 + self.key) - 0.5) * np.clip(0.05 / pixel, 0, 0.5)
        tone -= 0.2 * detail * (fv < 0.08)
        colour: Pixels = np.asarray(self.wall, np.float32) * tone.astype(np.float32)[..., None]
        fu, fv = np.abs(fu - np.float32(0.5)), np.abs(fv - np.float32(0.55))
        pane = (fu < self.glass / 2) & (fv < 0.3) & (v > self.floor * 0.9)
        dice = sample(fractal(256, 256, 4), iu * 2 + 2 * self.key, iv * 2 + 6 * self.key)
        glass = (0.15 + 0.45 * dice)[..., None] * np.asarray(light.horizon, np.float32)
        glass[dice < light.lit] = np.asarray((0.9, 0.7, 0.42), np.float32) / max(light.ambient, 0.3)
        dark = glass
        if pixel.min() < 0.1:
            glass = np.where((pane & ((fu > self.glass / 2 - 0.05) | (fv > 0.26)))[..., None], np.float32(0.75), glass)
        colour += (glass - colour) * (pane * detail)[..., None].astype(np.float32)
        if self.shop:
            low = v < self.floor * 0.9
            front = low & (v > self.floor * 0.7) & (u > -1e9)
            colour[front] = np.asarray(self.shop, np.float32)
            glazed = low & (v < self.floor * 0.68) & (v > 0.4) & (np.abs(u % 4.0 - 2) < 1.7)
            colour[glazed] = dark[glazed] + np.float32(0.08)
        return colour


def new_facade(rng: random.Random) -> Facade:
    """A house drawn at random."""
    walls = (
        (0.62, 0.40, 0.32),
        (0.75, 0.68, 0.55),
        (0.60, 0.60, 0.62),
        (0.82, 0.80, 0.76),
        (0.45, 0.40, 0.38),
        (0.55, 0.62, 0.66),
        (0.72, 0.52, 0.34),
        (0.36, 0.40, 0.46),
    )
    shops = ((0.70, 0.15, 0.15), (0.12, 0.30, 0.55), (0.15, 0.42, 0.25), (0.85, 0.70, 0.20), (0.2, 0.2, 0.2))
    return Facade(
        jitter(rng, pick(rng, walls), 0.08),
        rng.uniform(2.8, 3.8),
        rng.uniform(1.6, 3.6),
        rng.uniform(0.35, 0.85),
        jitter(rng, pick(rng, shops), 0.06) if rng.random() < 0.45 else None,
        int(rng.random() * 99991),
    )


def paint_front(
    canvas: Canvas, cam: Camera, light: Light, facade: Facade, x0: float, x1: float, z: float, tall: float
) -> None:
    """A wall facing the camera."""
    (left, top), (right, bottom) = cam.project(x0, tall, z), cam.project(x1, 0, z)
    found = canvas.window(left, top, right, bottom)
    if found is None:
        return
    rows, cols, xs, ys = found
    u = (xs - np.float32(cam.x)) * np.float32(z / cam.focal) - np.float32(x0)
    v = np.float32(cam.height) - (ys - np.float32(cam.y)) * np.float32(z / cam.focal)
    cover = np.clip(np.minimum(np.minimum(xs - left, right - xs), np.minimum(ys - top, bottom - ys)) + 0.5, 0, 1)
    shade = facade.shade(u, v, np.full_like(u, z / cam.focal), light) * np.float32(light.ambient * 0.85)
    canvas.paint(rows, cols, cover.astype(np.float32), shade, BUILDING, z)


def paint_side(
    canvas: Canvas, cam: Camera, light: Light, facade: Facade, x: float, z0: float, z1: float, tall: float
) -> None:
    """A wall along the street: each image column sees it at one distance."""
    a, b = cam.project(x, tall, z0), cam.project(x, 0, z1)
    found = canvas.window(min(a[0], b[0]), a[1], max(a[0], b[0]), cam.project(x, 0, z0)[1])
    if found is None:
        return
    rows, cols, xs, ys = found
    z = np.clip(np.float32(cam.focal * x) / (xs - np.float32(cam.x) + np.float32(1e-3)), z0, z1).astype(np.float32)
    top, bottom = cam.y + cam.focal * (cam.height - tall) / z, cam.y + cam.focal * cam.height / z
    across = np.minimum(xs - min(a[0], b[0]), max(a[0], b[0]) - xs)
    cover = np.clip(np.minimum(across, np.minimum(ys - top, bottom - ys)) + 0.5, 0, 1).astype(np.float32)
    v = np.float32(cam.height) - (ys - np.float32(cam.y)) * z / np.float32(cam.focal)
    pixel = np.maximum(z * z / np.float32(cam.focal * abs(x)), z / np.float32(cam.focal))
    sunlit = 1.0 - 0.45 * light.shadow - (0.9 * light.shadow if (x > 0) == (light.sun > 0) else 0) * abs(light.sun)
    shade = facade.shade(z - np.float32(z0), v, pixel, light)
    canvas.paint(rows, cols, cover, shade * np.float32(light.ambient * sunlit), BUILDING, z + np.zeros_like(v))


def paint_tree(canvas: Canvas, cam: Camera, rng: random.Random, light: Light, x: float, z: float, tall: float) -> None:
    """A trunk and a crown of noisy lobes; with tall < 2.5, a bush."""
    leaf = jitter(
        rng, pick(rng, ((0.20, 0.34, 0.12), (0.28, 0.40, 0.14), (0.14, 0.26, 0.13), (0.46, 0.36, 0.12))), 0.05
    )
    foot_x, foot_y = cam.project(x, 0, z)
    metre = cam.focal / z
    canvas.ellipse(foot_x, foot_y, tall * 0.25 * metre, tall * 0.04 * metre, (0.05, 0.06, 0.04), None, z, soft=1.0)
    bush = tall < 2.5
    if not bush:
        bark = scaled(jitter(rng, (0.30, 0.24, 0.18), 0.06), light.ambient)
        canvas.stroke(
            foot_x,
            foot_y,
            foot_x,
            foot_y - 0.5 * tall * metre,
            rng.uniform(0.25, 0.5) * metre,
            bark,
            VEGETATION,
            z,
        )
    for _ in range(1 if metre < 6 else 3):
        spread = rng.uniform(0.18, 0.34) * tall * metre * (1.6 if bush else 1)
        cx = foot_x + rng.uniform(-0.16, 0.16) * tall * metre
        cy = foot_y - (0.35 if bush else rng.uniform(0.58, 0.78)) * tall * metre
        found = canvas.window(cx - spread * 1.3, cy - spread * 1.3, cx + spread * 1.3, cy + spread * 1.3)
        if found is None:
            continue
        rows, cols, xs, ys = found
        u, v = (xs - np.float32(cx)) / np.float32(spread), (ys - np.float32(cy)) / np.float32(spread)
        shape = sample(fractal(8, 256, 3), u * 45 + rng.uniform(0, 512), v * 45 + rng.uniform(0, 512)) - 0.5
        cover = np.clip((1 - u * u - v * v + 2.2 * shape) * np.float32(max(spread / 4, 1.0)), 0, 1).astype(np.float32)
        bright = (0.85 + 1.5 * shape - 0.35 * v + 0.3 * light.sun * light.shadow * u) * light.ambient
        canvas.paint(
            rows,
            cols,
            cover,
            np.asarray(leaf, np.float32) * np.clip(bright, 0.1, 2)[..., None],
            VEGETATION,
            z,
        )


def paint_car(canvas: Canvas, cam: Camera, rng: random.Random, light: Light, x: float, z: float, ahead: bool) -> None:
    """A box with a cabin and wheels, its near end and one flank in view; sometimes a van or a bus."""
    kind = rng.random()
    wide, long, belt, roof = (
        (1.8, 4.3, 0.9, 1.45) if kind < 0.72 else (1.95, 5.2, 1.15, 2.1) if kind < 0.92 else (2.5, 9, 1.3, 3.0)
    )
    paints = (
        (0.80, 0.80, 0.82),
        (0.12, 0.12, 0.13),
        (0.45, 0.46, 0.48),
        (0.60, 0.10, 0.09),
        (0.12, 0.22, 0.45),
        (0.68, 0.66, 0.60),
        (0.85, 0.75, 0.15),
        (0.16, 0.32, 0.24),
        (0.55, 0.30, 0.12),
    )
    body = scaled(jitter(rng, pick(rng, paints), 0.05), light.ambient)
    glass = scaled(light.horizon, 0.28 * light.ambient)
    black = scaled((0.07, 0.07, 0.08), light.ambient)
    lo, hi, zb = x - wide / 2, x + wide / 2, z + long
    slope, inset = (0.9, 0.16) if kind < 0.72 else (0.25, 0.06)
    p = cam.project
    metre = cam.focal / z
    under = p(x, 0, z + 0.3)
    canvas.ellipse(under[0], under[1], 0.62 * wide * metre, 0.28 * metre, (0.03, 0.03, 0.03), None, z, soft=0.6)
    flank = lo if lo > 0 else hi if hi < 0 else None
    if flank is not None:
        tuck = flank + (inset if flank == lo else -inset)
        side = scaled(body, 0.8 if light.sun and (flank == lo) == (light.sun > 0) else 1.0)
        canvas.polygon(
            [p(flank, 0.28, z), p(flank, belt, z), p(flank, belt, zb), p(flank, 0.28, zb)], side, CAR, z, 0.4
        )
        canvas.polygon(
            [
                p(flank, belt, z),
                p(tuck, roof, z + slope),
                p(tuck, roof, zb - 2 * slope),
                p(flank, belt, zb - slope),
            ],
            side,
            CAR,
            z,
        )
        canvas.polygon(
            [
                p(flank, belt + 0.04, z + 0.4),
                p(tuck, roof - 0.1, z + slope),
                p(tuck, roof - 0.1, zb - 2 * slope),
                p(flank, belt + 0.04, zb - 1.4 * slope),
            ],
            glass,
            CAR,
            z,
        )
        for at in (z + 0.8, zb - 0.8):
            wx, wy = p(flank, 0.32, at)
            turned = abs(p(flank, 0, at - 0.32)[0] - p(flank, 0, at + 0.32)[0]) / 2
            canvas.ellipse(wx, wy, max(turned, 0.6), 0.32 * cam.focal / at, black, CAR, at)
            canvas.ellipse(
                wx,
                wy,
                max(turned, 0.6) * 0.55,
                0.18 * cam.focal / at,
                scaled((0.5, 0.5, 0.52), light.ambient),
                CAR,
                at,
            )
    for wheel in (lo + 0.12, hi - 0.12):
        (a, b), (c, d) = p(wheel - 0.12, 0.4, z), p(wheel + 0.12, 0.0, z)
        canvas.polygon([(a, b), (c, b), (c, d), (a, d)], black, CAR, z)
    canvas.polygon(
        [p(lo, belt, z), p(lo + inset, roof, z + slope), p(hi - inset, roof, z + slope), p(hi, belt, z)],
        body,
        CAR,
        z,
    )
    canvas.polygon(
        [
            p(lo + 0.12, belt + 0.03, z),
            p(lo + inset + 0.1, roof - 0.09, z + slope),
            p(hi - inset - 0.1, roof - 0.09, z + slope),
            p(hi - 0.12, belt + 0.03, z),
        ],
        glass,
        CAR,
        z,
        -0.5,
    )
    canvas.polygon([p(lo, 0.25, z), p(lo, belt, z), p(hi, belt, z), p(hi, 0.25, z)], body, CAR, z, 0.45)
    canvas.polygon([p(lo, 0.25, z), p(lo, 0.48, z), p(hi, 0.48, z), p(hi, 0.25, z)], scaled(body, 0.45), CAR, z)
    if metre > 7:
        glow = 1.0 if light.ambient < 0.5 else light.ambient * 0.75
        lamp = scaled((0.75, 0.06, 0.05) if ahead else (1.0, 0.97, 0.85), glow)
        for lx in (lo + 0.2, hi - 0.2):
            a, b = p(lx, belt - 0.18, z)
            canvas.ellipse(a, b, 0.16 * metre, 0.09 * metre, lamp, None, z)
            if light.ambient < 0.5:
                canvas.ellipse(a, b, 0.7 * metre, 0.5 * metre, lamp, None, z, soft=1.0)
        (a, b), (c, d) = p(x - 0.26, 0.66, z), p(x + 0.26, 0.54, z)
        canvas.polygon([(a, b), (c, b), (c, d), (a, d)], scaled((0.85, 0.85, 0.8), light.ambient), None, z)


def paint_person(canvas: Canvas, cam: Camera, rng: random.Random, light: Light, x: float, z: float) -> None:
    """Somebody walking: limbs are strokes, the rest ellipses; some carry a bag."""
    fx, fy = cam.project(x, 0, z)
    m = cam.focal / z * rng.uniform(0.85, 1.08)
    clothes = (
        (0.12, 0.13, 0.18),
        (0.55, 0.12, 0.14),
        (0.18, 0.28, 0.50),
        (0.78, 0.76, 0.70),
        (0.35, 0.38, 0.30),
        (0.80, 0.60, 0.15),
        (0.40, 0.40, 0.42),
        (0.25, 0.20, 0.16),
    )
    coat, legs = (scaled(jitter(rng, pick(rng, clothes), 0.05), light.ambient) for _ in range(2))
    skin = scaled(
        jitter(rng, pick(rng, ((0.80, 0.62, 0.50), (0.55, 0.38, 0.28), (0.36, 0.25, 0.18))), 0.03),
        light.ambient,
    )
    stride, build = rng.uniform(0.02, 0.3) * m, rng.uniform(0.85, 1.2)
    canvas.ellipse(fx, fy, 0.4 * m, 0.1 * m, (0.04, 0.04, 0.04), None, z, soft=1.0)
    for side in (-1, 1):
        canvas.stroke(
            fx + side * stride,
            fy - 0.05 * m,
            fx + side * 0.06 * m,
            fy - 0.85 * m,
            0.17 * build * m,
            legs,
            PERSON,
            z,
        )
        hand = fx + side * (0.27 + rng.uniform(-0.08, 0.12)) * m
        canvas.stroke(
            hand,
            fy - rng.uniform(0.75, 1.0) * m,
            fx + side * 0.2 * m,
            fy - 1.38 * m,
            0.11 * m,
            scaled(coat, 0.85),
            PERSON,
            z,
        )
    canvas.ellipse(fx, fy - 1.13 * m, 0.24 * build * m, 0.36 * m, coat, PERSON, z)
    canvas.ellipse(fx, fy - 1.58 * m, 0.11 * m, 0.14 * m, skin, PERSON, z)
    canvas.ellipse(fx, fy - 1.65 * m, 0.115 * m, 0.09 * m, scaled(legs, 0.5), PERSON, z)
    if rng.random() < 0.3:
        canvas.ellipse(fx + pick(rng, (-0.3, 0.3)) * m, fy - 0.7 * m, 0.13 * m, 0.17 * m, scaled(coat, 0.5), PERSON, z)


def paint_post(canvas: Canvas, cam: Camera, rng: random.Random, light: Light, x: float, z: float) -> None:
    """A street lamp, a bollard, a traffic light or a pole with one or two signs."""
    fx, fy = cam.project(x, 0, z)
    m, kind, inward = cam.focal / z, rng.random(), -1.0 if x > 0 else 1.0
    metal = scaled(
        jitter(
            rng,
            pick(rng, ((0.45, 0.46, 0.47), (0.25, 0.26, 0.27), (0.16, 0.22, 0.18), (0.62, 0.62, 0.60))),
            0.04,
        ),
        light.ambient,
    )
    if kind < 0.38:
        top, reach = fy - rng.uniform(5, 8) * m, fx + inward * rng.uniform(0.8, 2.2) * m
        canvas.stroke(fx, fy, fx, top, 0.15 * m, metal, POLE, z)
        canvas.stroke(fx, top, reach, top - 0.25 * m, 0.1 * m, metal, POLE, z)
        canvas.stroke(reach, top - 0.22 * m, reach + inward * 0.5 * m, top - 0.22 * m, 0.18 * m, metal, POLE, z)
        return
    if kind < 0.48:
        canvas.stroke(fx, fy, fx, fy - 1.0 * m, 0.14 * m, metal, POLE, z)
        return
    tall = rng.uniform(2.4, 3.4)
    canvas.stroke(fx, fy, fx, fy - tall * m, 0.11 * m, metal, POLE, z)
    y = fy - tall * m
    if kind < 0.62:
        canvas.polygon(
            [
                (fx - 0.2 * m, y - 0.5 * m),
                (fx + 0.2 * m, y - 0.5 * m),
                (fx + 0.2 * m, y + 0.5 * m),
                (fx - 0.2 * m, y + 0.5 * m),
            ],
            scaled((0.08, 0.09, 0.08), light.ambient),
            SIGN,
            z,
        )
        at, glow = pick(rng, ((-0.32, (1.0, 0.15, 0.1)), (0.0, (1.0, 0.75, 0.1)), (0.32, (0.15, 0.95, 0.45))))
        canvas.ellipse(fx, y + at * m, 0.13 * m, 0.13 * m, glow, None, z)
        return
    for _ in range(1 + int(rng.random() * 1.6)):
        s, shape, back = rng.uniform(0.32, 0.5) * m, rng.random(), rng.random() < 0.15
        red, blue, pale = (
            scaled(c, light.ambient) for c in ((0.78, 0.10, 0.10), (0.10, 0.28, 0.68), (0.92, 0.92, 0.90))
        )
        if back:  # seen from behind: bare metal, only the shape tells
            red = blue = pale = scaled(metal, 1.15)
        if shape < 0.4:
            canvas.ellipse(fx, y, s, s, pick(rng, (red, red, blue)), SIGN, z)
            canvas.ellipse(fx, y, s * 0.7, s * pick(rng, (0.7, 0.2)), pale, None, z)
        elif shape < 0.65:
            canvas.polygon([(fx - s, y + 0.7 * s), (fx, y - s), (fx + s, y + 0.7 * s)], red, SIGN, z)
            canvas.polygon(
                [(fx - s * 0.6, y + 0.45 * s), (fx, y - s * 0.6), (fx + s * 0.6, y + 0.45 * s)], pale, None, z
            )
        else:
            w = s * rng.uniform(0.7, 1.9)
            canvas.polygon(
                [(fx - w, y - s * 0.8), (fx + w, y - s * 0.8), (fx + w, y + s * 0.8), (fx - w, y + s * 0.8)],
                pick(
                    rng,
                    (
                        blue,
                        pale,
                        scaled((0.10, 0.42, 0.24), light.ambient),
                        scaled((0.9, 0.75, 0.1), light.ambient),
                    ),
                ),
                SIGN,
                z,
            )
            canvas.stroke(fx - w * 0.6, y, fx + w * 0.6, y, s * 0.3, scaled(pale, 0.9), None, z)
        y += 2.0 * s
