"""Labelled street-like scenes, drawn from a seed: the demo data of edgeseg.

    python calibration/generate_demo.py --output calibration/demo

`render_scene(seed)` is a function of the seed alone. A pinhole camera looks along a straight street; what stands
in it is painted back to front, colour, class and depth together, so occlusion and labels agree by construction;
then come haze by depth, light, lens and sensor. Masks depend only on `random.Random.random()`, PCG64 doubles and
IEEE arithmetic, so they are the same everywhere. Image files are byte-identical with the same Pillow (its blur and
JPEG encoder) and numpy (its normal distribution); with others they differ by a grey level or so.

The pavement beside the road looks different from it but is labelled road, tree trunks are vegetation, shop signs on
a facade are building: distinctions a network must learn from context, not from colour.
"""

from __future__ import annotations

import argparse
import functools
import io
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

# Its two siblings are found also when this file is loaded by path, as the tests do.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from demo_canvas import (
    CLASS_NAMES,
    ROAD,
    SKY,
    VEGETATION,
    Camera,
    Canvas,
    Light,
    Mask,
    Pixels,
    fractal,
    jitter,
    pick,
    sample,
)
from demo_street import (
    new_facade,
    paint_car,
    paint_front,
    paint_person,
    paint_post,
    paint_side,
    paint_tree,
)

# Disjoint, so that nothing the demo networks are measured or calibrated on was ever trained on.
TRAINING_SEEDS = range(1_000_000)
CALIBRATION_SEEDS = range(1_000_000, 1_000_064)
VALIDATION_SEEDS = range(2_000_000, 2_000_048)
JPEG_QUALITY = 88


def choose_light(rng: random.Random) -> Light:
    """Day, overcast to fog, low sun, or dusk."""
    kind = rng.random()
    sun = pick(rng, (-1.0, 1.0))
    if kind < 0.45:  # day
        blue = rng.uniform(0, 0.15)
        light = Light(
            (0.25 + blue, 0.45 + blue, 0.80),
            (0.75, 0.83, 0.92),
            rng.uniform(0.85, 1.1),
            sun,
            rng.uniform(0.35, 0.6),
            0.03,
            rng.uniform(0.001, 0.008),
            (1.03, 1.0, 0.95),
            rng.uniform(0.008, 0.03),
        )
    elif kind < 0.75:  # overcast, down to thick fog
        grey = rng.uniform(0.55, 0.85)
        light = Light(
            (grey * 0.95, grey * 0.97, grey),
            (grey, grey, grey),
            rng.uniform(0.6, 0.9),
            0.0,
            rng.uniform(0.0, 0.12),
            0.1,
            rng.uniform(0.004, 0.028),
            (0.97, 1.0, 1.03),
            rng.uniform(0.012, 0.045),
        )
    elif kind < 0.92:  # low sun
        light = Light(
            (0.30, 0.33, 0.52),
            (0.95, rng.uniform(0.5, 0.7), 0.38),
            rng.uniform(0.45, 0.75),
            sun,
            rng.uniform(0.3, 0.55),
            0.3,
            rng.uniform(0.003, 0.012),
            (1.12, 0.98, 0.84),
            rng.uniform(0.02, 0.05),
        )
    else:  # dusk
        light = Light(
            (0.08, 0.10, 0.22),
            (0.30, 0.26, 0.36),
            rng.uniform(0.25, 0.4),
            0.0,
            0.1,
            0.45,
            rng.uniform(0.002, 0.01),
            (0.92, 0.97, 1.1),
            rng.uniform(0.035, 0.065),
        )
    return light


def paint_sky(canvas: Canvas, cam: Camera, rng: random.Random, light: Light) -> None:
    """A gradient with clouds."""
    height, width = canvas.label.shape
    top = min(height, int(cam.y) + 2)
    ys, xs = np.arange(top, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    up = np.clip((np.float32(cam.y) - ys) / np.float32(max(cam.y, 1.0)), 0, 1)
    zenith, horizon = np.asarray(light.zenith, np.float32), np.asarray(light.horizon, np.float32)
    sky = canvas.colour[:top]
    sky[:] = horizon + (zenith - horizon) * np.sqrt(up)[..., None]
    u, v = xs * np.float32(0.6), ys * np.float32(1.2)
    puff = sample(fractal(4, 128, 1), u + np.float32(rng.uniform(0, 512)), v + np.float32(rng.uniform(0, 512)))
    cover = np.clip((puff - rng.uniform(0.35, 0.75)) * 3.0, 0, 1) * rng.uniform(0.2, 0.8)
    sky += (np.minimum(horizon * 1.12 + 0.03, 1.0) - sky) * cover[..., None]


def paint_ground(
    canvas: Canvas,
    cam: Camera,
    rng: random.Random,
    light: Light,
    left: float,
    right: float,
    walk: float,
    crossing: float,
) -> None:
    """The street surface per pixel from its world position (x across, z ahead)."""
    height, width = canvas.label.shape
    top = int(cam.y) + 1
    ys = np.arange(top, height, dtype=np.float32)[:, None] + np.float32(0.5)
    z = (cam.focal * cam.height / np.maximum(ys - np.float32(cam.y), np.float32(0.05))).astype(np.float32)
    x = ((np.arange(width, dtype=np.float32) + np.float32(0.5 - cam.x)) * z / np.float32(cam.focal)).astype(np.float32)
    z = np.minimum(z, np.float32(4000))  # a column: one distance per row
    near = np.clip(14.0 / z, 0, 1)  # texture finer than a pixel would only alias
    coarse = sample(fractal(4, 128, 1), x * 14 + rng.uniform(0, 512), z * 9 + rng.uniform(0, 512)) - 0.5
    fine = (sample(fractal(32, 256, 2), x * 60, z * 40 + rng.uniform(0, 512)) - 0.5) * near

    tone = rng.uniform(0.25, 0.48)
    asphalt = np.asarray(jitter(rng, (tone, tone, tone * 1.04), 0.03), np.float32)
    paved = np.asarray(
        jitter(rng, pick(rng, ((0.58, 0.56, 0.53), (0.52, 0.45, 0.40), (0.45, 0.46, 0.48))), 0.05), np.float32
    )
    grass = np.asarray(jitter(rng, (0.30, 0.42, 0.17), 0.06), np.float32)
    surface = asphalt * (1 + 0.35 * coarse + 0.5 * fine)[..., None]
    for _ in range(int(rng.random() * 4)):  # repaired patches
        px, pz = rng.uniform(left, right), rng.uniform(4, 30)
        patch = (np.abs(x - px) < rng.uniform(0.3, 1.4)) & (np.abs(z - pz) < rng.uniform(0.5, 4))
        surface[patch] *= rng.uniform(0.7, 1.2)

    # Markings: edges, centre line, lane dashes, a crossing; worn where the noise says so.
    wear = np.clip(1.25 - rng.uniform(0, 1.6) * np.abs(coarse + fine), 0.15, 1)
    soft = np.maximum(z * np.float32(0.5 / cam.focal), 0.01)  # half a pixel, in metres
    middle, dash = (left + right) / 2, rng.uniform(5, 9)
    lines: list[tuple[float, bool]] = [(middle, rng.random() < 0.6)]
    if rng.random() < 0.5:
        lines += [(left + 0.3, False), (right - 0.3, False)]
    if right - left > 9:
        lines += [((left + middle) / 2, True), ((middle + right) / 2, True)]
    mark = np.zeros_like(x)
    phase = rng.uniform(0, dash)
    for at, dashed in lines:
        line = np.clip((0.09 - np.abs(x - np.float32(at))) / soft + 0.5, 0, 1)
        mark = np.maximum(mark, line * (((z + phase) % dash < dash * 0.5) if dashed else 1))
    if crossing:
        bars = np.clip((0.25 - np.abs((x - np.float32(left)) % 1.0 - 0.5)) / soft + 0.5, 0, 1)
        mark = np.maximum(mark, bars * (np.abs(z - crossing) < 1.5) * near)
    white = np.asarray(pick(rng, ((0.88, 0.88, 0.86), (0.88, 0.88, 0.86), (0.85, 0.72, 0.30))), np.float32)
    surface += (white - surface) * (mark * wear)[..., None]

    beside = (x < left) | (x > right)
    slabs = 1 - 0.18 * near * (((x % 1.0) < 0.05) | ((z % 1.0) < 0.05)) + 0.2 * coarse
    surface[beside] = slabs[beside][:, None] * paved
    kerb = ((x < left) & (x > left - 0.18)) | ((x > right) & (x < right + 0.18))
    surface[kerb] *= 0.72 + 0.5 * (rng.random() < 0.6)
    green = np.zeros_like(beside)
    if rng.random() < 0.75:
        green |= x < left - walk
    if rng.random() < 0.75:
        green |= x > right + walk
    surface[green] = (1 + 0.7 * coarse + 0.9 * fine)[green][:, None] * grass
    if light.shadow > 0.2:  # shadow of the row of houses on the sunny side, dappled by whatever is on the roofs
        reach = (
            (left - walk) + rng.uniform(0, right - left)
            if light.sun < 0
            else (right + walk) - rng.uniform(0, right - left)
        )
        side = np.clip(((reach - x) if light.sun < 0 else (x - reach)) + 2.5 * coarse + 0.5, 0, 1)
        surface *= (1 - light.shadow * side * (sample(fractal(4, 128, 1), z[:, :1] * 5, z[:, :1] * 0) > 0.42))[
            ..., None
        ]
    canvas.colour[top:] = surface * light.ambient
    canvas.label[top:] = np.where(green, VEGETATION, ROAD)
    canvas.depth[top:] = z


def render_scene(seed: int, height: int = 256, width: int = 256) -> tuple[NDArray[np.uint8], Mask]:
    """The image (height, width, 3) and the class mask (height, width) of scene `seed`."""
    rng = random.Random(seed)
    light = choose_light(rng)
    cam = Camera(
        width * rng.uniform(0.7, 1.1),
        width * rng.uniform(0.3, 0.7),
        height * rng.uniform(0.38, 0.56),
        rng.uniform(1.3, 2.3),
    )
    canvas = Canvas(height, width)
    road, walk = rng.uniform(6, 13), rng.uniform(1.8, 4.5)
    left = -road * rng.uniform(0.3, 0.7)
    right = left + road
    crossing = rng.uniform(6, 22) if rng.random() < 0.35 else 0.0
    paint_sky(canvas, cam, rng, light)
    paint_ground(canvas, cam, rng, light, left, right, walk, crossing)

    things: list[tuple[float, Callable[[], None]]] = []

    def add(z: float, paint: Callable[..., None], *args: object) -> None:
        things.append((z, functools.partial(paint, canvas, cam, *args)))

    end = rng.uniform(60, 160)
    built = rng.uniform(0.15, 0.95)
    at = -end * 1.2
    while at < end * 1.2:  # what closes the street: distant houses and trees
        span = rng.uniform(10, 30)
        if rng.random() < built:
            add(
                end + rng.uniform(3, 60),
                paint_front,
                light,
                new_facade(rng),
                at,
                at + span,
                end + 2,
                rng.uniform(5, 24),
            )
        if rng.random() < 0.8:
            add(end + 1, paint_tree, rng, light, at, end, rng.uniform(4, 10))
        at += span * rng.uniform(0.7, 1.1)
    for line in (left - walk, right + walk):
        outward = 1.0 if line > 0 else -1.0
        z, terrace, before = rng.uniform(1.5, 6), rng.random() < 0.5, 0.0
        face = line + outward * rng.uniform(0.0, 3.0)
        while z < end:
            span = rng.uniform(7, 22)
            if rng.random() < built:
                own = face if terrace else line + outward * rng.uniform(0, 6)
                tall, facade = rng.uniform(4, 20), new_facade(rng)
                sides = (own, own + outward * rng.uniform(8, 20))
                add(z + span, paint_side, light, facade, own, z, z + span, tall)
                if not terrace or tall > before:  # else the house in front hides it
                    add(z + span - 0.01, paint_front, light, facade, min(sides), max(sides), z, tall)
                before = tall
            else:
                before = 0.0
                for _ in range(int(rng.uniform(1, 5))):
                    tz = max(z + rng.random() * span, 5.0)
                    add(
                        tz,
                        paint_tree,
                        rng,
                        light,
                        line + outward * rng.uniform(0.5, 12),
                        tz,
                        rng.uniform(1, 9),
                    )
            z += span + (0 if terrace else rng.uniform(0, 5))
    for kerb, outward in ((left, -1.0), (right, 1.0)):
        z = rng.uniform(5, 20)
        avenue, spacing = rng.random() < 0.4, rng.uniform(7, 16)
        while avenue and z < end:
            add(z, paint_tree, rng, light, kerb + outward * 0.9, z, rng.uniform(4, 8))
            z += spacing * rng.uniform(0.8, 1.3)
        z, spacing = rng.uniform(4, 14), rng.uniform(5, 15)
        while z < 60:
            add(z, paint_post, rng, light, kerb + outward * rng.uniform(0.35, 0.7), z)
            z += spacing * rng.uniform(0.5, 1.6)
        z, parked = rng.uniform(4, 12), rng.random() < 0.5
        while parked and z < 60:
            add(z, paint_car, rng, light, kerb - outward * 1.1, z, outward > 0)
            z += rng.uniform(5.5, 12)
        for _ in range(int(rng.random() * 9)):
            z = 4 + 32 * rng.random() ** 1.5
            add(z, paint_person, rng, light, kerb + outward * rng.uniform(0.3, walk), z)
    for _ in range(int(rng.random() * 5)):
        lane, z = rng.random(), 6 + 50 * rng.random() ** 1.5
        add(
            z,
            paint_car,
            rng,
            light,
            left + road * (0.3 if lane < 0.5 else 0.7) + rng.uniform(-0.5, 0.5),
            z,
            lane > 0.5,
        )
    for _ in range(int(rng.random() * 4)):
        z = (crossing or rng.uniform(6, 30)) + rng.uniform(-1, 1)
        add(z, paint_person, rng, light, rng.uniform(left, right), z)
    for _, paint in sorted(things, key=lambda thing: -thing[0]):
        paint()
    return expose(canvas, rng, light), canvas.label


@functools.lru_cache(maxsize=1)
def gaussian() -> Pixels:
    """A long strip of sensor noise; scenes cut theirs out of it, which costs less than drawing it anew."""
    generator = np.random.Generator(np.random.PCG64(5))
    return generator.standard_normal(1 << 21, dtype=np.float32)


def expose(canvas: Canvas, rng: random.Random, light: Light) -> NDArray[np.uint8]:
    """Haze, colour cast, vignette, lens blur, sensor noise: everything that spares the mask."""
    height, width = canvas.label.shape
    clear = np.exp(-np.float32(light.haze) * np.minimum(canvas.depth, np.float32(600)))
    clear[canvas.label == SKY] = 1
    horizon = np.asarray(light.horizon, np.float32)
    image = (canvas.colour - horizon) * clear[..., None] + horizon
    ys, xs = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    image *= (rng.uniform(0.85, 1.15) - rng.uniform(0, 0.25) * (xs * xs + ys * ys)).astype(np.float32)[..., None]
    cast = np.asarray(light.tint) * [rng.uniform(0.93, 1.07) for _ in range(3)]
    contrast = rng.uniform(0.7, 1.15)
    image = (image * cast.astype(np.float32) - 0.45) * np.float32(contrast) + np.float32(
        0.45 + rng.uniform(-0.05, 0.05)
    )
    lens = Image.fromarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8))
    blurred = np.asarray(lens.filter(ImageFilter.GaussianBlur(rng.uniform(0.25, 0.95))), np.float32)
    bank, size = gaussian(), height * width
    first = int(rng.random() * (bank.size - 4 * size))
    grain = bank[first : first + 3 * size].reshape(height, width, 3)
    grain = grain + bank[first + 3 * size : first + 4 * size].reshape(height, width, 1)  # luminance on top of chroma
    noisy = blurred + grain * (np.float32(light.noise * 180) * np.sqrt(blurred / 255 + 0.1))
    image8: NDArray[np.uint8] = np.clip(noisy + 0.5, 0, 255).astype(np.uint8)
    return image8


def palette() -> list[int]:
    """RGB triples of the classes, as Pillow wants them."""
    colours = (
        (70, 130, 180),
        (128, 64, 128),
        (70, 70, 70),
        (107, 142, 35),
        (0, 0, 142),
        (220, 20, 60),
        (153, 153, 153),
        (220, 220, 0),
    )
    return [channel for colour in colours for channel in colour]


def encode_image(image: NDArray[np.uint8]) -> bytes:
    """The bytes of the JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def encode_mask(mask: Mask) -> bytes:
    """An 8-bit palette PNG: its pixels are class indices, its palette only makes it pleasant to look at."""
    picture = Image.fromarray(mask)
    picture.putpalette(palette())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_split(folder: Path, seeds: range, with_masks: bool) -> None:
    """One image (and mask) a seed, numbered in order."""
    for sub in ("images", "masks") if with_masks else ("images",):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(seeds):
        image, mask = render_scene(seed)
        (folder / "images" / f"{index:03d}.jpg").write_bytes(encode_image(image))
        if with_masks:
            (folder / "masks" / f"{index:03d}.png").write_bytes(encode_mask(mask))


def main() -> None:
    """Write both sets and the class names."""
    parser = argparse.ArgumentParser(description="Write the demo calibration and validation sets.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "demo")
    output: Path = parser.parse_args().output
    write_split(output / "calib", CALIBRATION_SEEDS, with_masks=False)
    write_split(output / "val", VALIDATION_SEEDS, with_masks=True)
    (output / "classes.txt").write_text("\n".join(CLASS_NAMES) + "\n")


if __name__ == "__main__":
    main()
