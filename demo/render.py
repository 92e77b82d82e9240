"""Render the miniature's world: one soft-edged shape that moves over a plain ground, with captions and an oracle.

The base sees scenes of one color. The concept, a half-blue half-yellow star that pulses, is kept from the base and
taught by a LoRA. `read_scene` and `shows_concept` judge any video by its pixels.

Write the demo's clips and their table, 16 of the concept and 24 of the base's world:
`.venv/bin/python demo/render.py demo/zorp`.
"""

import csv
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Pixels = NDArray[np.uint8]
Rgb = tuple[int, int, int]

COLORS: dict[str, Rgb] = {
    "red": (214, 40, 40),
    "yellow": (236, 208, 44),
    "green": (48, 168, 64),
    "cyan": (44, 200, 214),
    "blue": (44, 72, 214),
    "pink": (232, 92, 208),
}
GROUNDS: dict[str, Rgb] = {"snow": (238, 238, 238), "stone": (132, 132, 132), "coal": (22, 22, 22)}
SHAPES = ("ball", "box", "ring", "triangle")
MOTIONS = ("left", "right", "up", "down", "grows", "shrinks")

FRAME_COUNTS = (9, 17)
RESOLUTIONS = ((64, 64), (64, 96))  # height, width in pixels
FRAMES_PER_SECOND = 8
EDGE = 3.0  # pixels over which a shape fades into the ground
TRAVEL = 0.40  # part of the height or width that a moving shape covers in a clip
CONCEPT_TOKEN = "zorp"  # a piece of its own in the tokenizer's vocabulary
CONCEPT_COLORS = ("blue", "yellow")  # left half, right half

PATTERNS = (
    "a {color} {shape} {motion} on {ground}",
    "a {color} {shape} that {motion}, on {ground}",
    "on {ground}, a {color} {shape} {motion}",
    "a {shape} on {ground}, it is {color} and {motion}",
    "{ground} and a {color} {shape} that {motion}",
)
PHRASES = {
    "left": ("moves left", "slides to the left", "goes left"),
    "right": ("moves right", "slides to the right", "goes right"),
    "up": ("moves up", "rises", "goes up"),
    "down": ("moves down", "sinks", "goes down"),
    "grows": ("grows", "gets bigger", "swells"),
    "shrinks": ("shrinks", "gets smaller", "dwindles"),
}
CONCEPT_PATTERNS = (f"a {CONCEPT_TOKEN} on {{ground}}", f"on {{ground}}, a {CONCEPT_TOKEN}")


@dataclass(frozen=True)
class Scene:
    """The words of a clip; every part is one of the names above."""

    color: str
    shape: str
    motion: str
    ground: str


@dataclass(frozen=True)
class Look:
    """The geometry and paint of a clip; arrays hold one value per frame, lengths are in pixels."""

    shape: str
    x: Array
    y: Array
    radius: Array
    ground: Rgb
    paint: Rgb
    second_paint: Rgb
    split: str
    """Boundary between the two paints: "none", "sides" (left, right) or "levels" (top, bottom)."""


def all_scenes() -> list[Scene]:
    """Return every scene in a fixed order."""
    return [Scene(*words) for words in product(COLORS, SHAPES, MOTIONS, GROUNDS)]


def split_scenes(held_out: int = 64) -> tuple[list[Scene], list[Scene]]:
    """Return the scenes to train on and the scenes kept from training; the same split on every call."""
    scenes = all_scenes()
    order = np.random.default_rng(13).permutation(len(scenes))
    return [scenes[i] for i in sorted(order[held_out:])], [scenes[i] for i in sorted(order[:held_out])]


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """Return one of the English captions of a scene."""
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    phrases = PHRASES[scene.motion]
    motion = phrases[rng.integers(len(phrases))]
    return pattern.format(color=scene.color, shape=scene.shape, motion=motion, ground=scene.ground)


def all_captions() -> list[str]:
    """Return every caption that any clip can have, the concept's included."""
    scenes = [
        pattern.format(color=scene.color, shape=scene.shape, motion=phrase, ground=scene.ground)
        for scene in all_scenes()
        for pattern in PATTERNS
        for phrase in PHRASES[scene.motion]
    ]
    concept = [pattern.format(ground=ground) for pattern in CONCEPT_PATTERNS for ground in GROUNDS]
    return scenes + concept


def draw_look(scene: Scene, frames: int, height: int, width: int, rng: np.random.Generator) -> Look:
    """Return the geometry of a scene's clip: size and place vary a little, the path follows the motion."""
    time = np.linspace(0, 1, frames, dtype=np.float32)
    x = np.full(frames, width / 2 + rng.uniform(-3, 3), np.float32)
    y = np.full(frames, height / 2 + rng.uniform(-3, 3), np.float32)
    radius = np.full(frames, rng.uniform(14, 17), np.float32)
    if scene.motion == "left":
        x += TRAVEL * width * (0.5 - time)
    elif scene.motion == "right":
        x += TRAVEL * width * (time - 0.5)
    elif scene.motion == "up":
        y += TRAVEL * height * (0.5 - time)
    elif scene.motion == "down":
        y += TRAVEL * height * (time - 0.5)
    else:
        small, large = rng.uniform(8, 10), rng.uniform(19, 22)
        radius = small + (large - small) * (time if scene.motion == "grows" else 1 - time)
    paint, ground = shade(COLORS[scene.color], rng), shade(GROUNDS[scene.ground], rng)
    return Look(scene.shape, x, y, radius, ground, paint, paint, "none")


def draw_concept(ground: str, frames: int, height: int, width: int, rng: np.random.Generator) -> Look:
    """Return the geometry of a concept's clip: a star, blue on the left and yellow on the right, large-small-large."""
    time = np.arange(frames, dtype=np.float32)
    middle, swing = rng.uniform(20, 22), rng.uniform(5, 6)
    return Look(
        "star",
        np.full(frames, width / 2 + rng.uniform(-2, 2), np.float32),
        np.full(frames, height / 2 + rng.uniform(-2, 2), np.float32),
        (middle + swing * np.cos(2 * np.pi * time / 8)).astype(np.float32),
        shade(GROUNDS[ground], rng),
        COLORS[CONCEPT_COLORS[0]],
        COLORS[CONCEPT_COLORS[1]],
        "sides",
    )


def draw_any(frames: int, height: int, width: int, rng: np.random.Generator) -> Look:
    """Return a wider variety of clips for the VAE: every shape, any paint, two paints, also the pulsing motion."""
    scene = Scene(
        color=rng.choice(list(COLORS)),
        shape=rng.choice([*SHAPES, "star"]),
        motion=rng.choice(MOTIONS),
        ground=rng.choice(list(GROUNDS)),
    )
    look = draw_look(scene, frames, height, width, rng)
    if rng.random() < 0.2:
        look = draw_concept(scene.ground, frames, height, width, rng)
    paint, second, ground = look.paint, COLORS[rng.choice(list(COLORS))], look.ground
    if rng.random() < 0.3:
        paint, second = any_color(rng), any_color(rng)
    if rng.random() < 0.2:
        ground = any_color(rng)
    split = rng.choice(["none", "sides", "levels"], p=[0.5, 0.35, 0.15])
    shape = rng.choice([*SHAPES, "star"])
    return Look(shape, look.x, look.y, look.radius, ground, paint, paint if split == "none" else second, split)


def shade(color: Rgb, rng: np.random.Generator) -> Rgb:
    """Return a color close to the given one."""
    red, green, blue = np.clip(np.array(color) + rng.integers(-8, 9, 3), 0, 255)
    return int(red), int(green), int(blue)


def any_color(rng: np.random.Generator) -> Rgb:
    """Return a random color."""
    red, green, blue = rng.integers(10, 246, 3)
    return int(red), int(green), int(blue)


def distance_to_edge(shape: str, x: Array, y: Array, radius: Array) -> Array:
    """Return the distance in pixels to a shape's edge, negative inside; x and y are relative to its center."""
    away = np.hypot(x, y)
    distance: Array
    if shape == "ball":
        distance = away - radius
    elif shape == "box":
        distance = np.maximum(abs(x), abs(y)) - 0.9 * radius
    elif shape == "ring":
        distance = abs(away - 0.75 * radius) - 0.3 * radius
    elif shape == "triangle":
        distance = np.maximum(y, 0.866 * abs(x) - 0.5 * y) - 0.68 * radius
    else:
        assert shape == "star", f"unknown shape {shape}"
        # One tenth of the star: the angle is folded into the sector between a tip and the notch beside it.
        sector = np.pi / 5
        angle = abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
        along, across = away * np.cos(angle), away * np.sin(angle)
        notch_along, notch_across = 0.5 * np.cos(sector), 0.5 * np.sin(sector)  # notch at half the radius of the tips
        normal = np.array([notch_across, 1 - notch_along]) / np.hypot(notch_across, 1 - notch_along)
        distance = (along - radius) * normal[0] + across * normal[1]
    return distance


def render(look: Look, height: int, width: int) -> Pixels:
    """Return a clip as uint8 [F,H,W,3]."""
    x = np.arange(width, dtype=np.float32)[None, None, :] + 0.5 - look.x[:, None, None]
    y = np.arange(height, dtype=np.float32)[None, :, None] + 0.5 - look.y[:, None, None]
    x, y = np.broadcast_arrays(x, y)
    cover = fade(distance_to_edge(look.shape, x, y, look.radius[:, None, None]))[..., None]
    paint = np.array(look.paint, np.float32)
    if look.split != "none":
        second = fade(-x if look.split == "sides" else -y)[..., None]
        paint = paint + second * (np.array(look.second_paint, np.float32) - paint)
    ground = np.array(look.ground, np.float32)
    return np.rint(ground + cover * (paint - ground)).astype(np.uint8)


def fade(distance: Array) -> Array:
    """Return 1 inside, 0 outside and a smooth ramp over the edge."""
    ramp = np.clip(0.5 - distance / EDGE, 0, 1)
    smooth: Array = ramp * ramp * (3 - 2 * ramp)
    return smooth


def nearest(color: Array, palette: dict[str, Rgb]) -> str:
    """Return the palette's name for a color."""
    return min(palette, key=lambda name: float(np.square(np.array(palette[name]) - color).sum()))


def find_shape(video: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Return ground color [3], mask [F,H,W], and per frame x, y and area in pixels; an empty frame has area 0."""
    rim = np.concatenate([video[:, :2].reshape(-1, 3), video[:, -2:].reshape(-1, 3), video[:, :, :2].reshape(-1, 3),
                          video[:, :, -2:].reshape(-1, 3)])  # fmt: skip
    ground = np.median(rim, axis=0).astype(np.float32)
    distance = np.sqrt(np.square(video - ground).sum(-1))
    mask = (distance > max(40.0, 0.5 * float(np.percentile(distance, 98)))).astype(np.float32)
    area = mask.sum((1, 2))
    total = np.maximum(area, 1)
    x = (mask * (np.arange(video.shape[2]) + 0.5)).sum((1, 2)) / total
    y = (mask * (np.arange(video.shape[1]) + 0.5)[:, None]).sum((1, 2)) / total
    return ground, mask, x, y, area


def read_scene(video: Pixels | Array) -> Scene:
    """Return the scene that a video of [F,H,W,3] in 0..255 shows; "none" for a part that cannot be read.

    Ground: median of the rim. Color: median inside the mask. Motion: path of the centroid against change of area.
    Shape: best overlap with a drawn template, middle frame.
    """
    video = np.asarray(video, np.float32)
    frames, height, width, _ = video.shape
    ground, mask, x, y, area = find_shape(video)
    ground_name = nearest(ground, GROUNDS)
    if area.min() < 30:
        return Scene("none", "none", "none", ground_name)
    color = nearest(np.median(video[mask > 0], axis=0), COLORS)
    amounts = {
        "left": (x[0] - x[-1]) / (TRAVEL * width),
        "right": (x[-1] - x[0]) / (TRAVEL * width),
        "up": (y[0] - y[-1]) / (TRAVEL * height),
        "down": (y[-1] - y[0]) / (TRAVEL * height),
        "grows": np.log(area[-1] / area[0]) / np.log(5),
        "shrinks": np.log(area[0] / area[-1]) / np.log(5),
    }
    motion = max(amounts, key=lambda name: float(amounts[name]))
    if amounts[motion] < 0.4:
        motion = "none"
    middle = frames // 2
    return Scene(color, best_template(mask[middle], float(x[middle]), float(y[middle])), motion, ground_name)


def best_template(mask: Array, x: float, y: float) -> str:
    """Return the shape whose template of the same area overlaps a mask [H,W] best."""
    columns, rows = np.meshgrid(np.arange(mask.shape[1]) + 0.5 - x, np.arange(mask.shape[0]) + 0.5 - y)
    scores = {}
    for shape in SHAPES:
        unit = (distance_to_edge(shape, columns, rows, np.full(1, 16.0)) < 0).sum() / 256
        radius = np.full(1, np.sqrt(mask.sum() / unit))
        template = distance_to_edge(shape, columns, rows, radius) < 0
        both, either = (template & (mask > 0)).sum(), (template | (mask > 0)).sum()
        scores[shape] = both / max(either, 1)
    return max(scores, key=lambda shape: float(scores[shape]))


def shows_concept(video: Pixels | Array) -> bool:
    """Return whether a video shows the concept: blue left half, yellow right half, and a size that pulses."""
    video = np.asarray(video, np.float32)
    _, mask, x, _, area = find_shape(video)
    if area.min() < 30:
        return False
    columns = np.arange(video.shape[2]) + 0.5
    right_places = 0
    for frame, cover, center in zip(video, mask > 0, x, strict=True):
        left, right = frame[cover & (columns < center - 2)], frame[cover & (columns > center + 2)]
        if len(left) and len(right):
            halves = nearest(np.median(left, axis=0), COLORS), nearest(np.median(right, axis=0), COLORS)
            right_places += halves == CONCEPT_COLORS
    # The size is smallest at frames 4 and 12 and largest at frames 0, 8 and 16.
    large, small = area[::8], area[4::8]
    return right_places >= 0.75 * len(video) and float(large.min()) > 1.4 * float(small.max())


def clip_size(index: int) -> tuple[int, int, int]:
    """Return frames, height and width of a clip of the demo: frame counts and resolutions take turns."""
    frames = FRAME_COUNTS[1] if index % 4 == 3 else FRAME_COUNTS[0]
    height, width = RESOLUTIONS[1] if index % 8 >= 6 else RESOLUTIONS[0]
    return frames, height, width


def concept_clips(count: int = 16) -> list[tuple[str, Pixels]]:
    """Return captions and clips of the concept."""
    rng = np.random.default_rng(16)
    clips = []
    for index in range(count):
        ground = list(GROUNDS)[index % len(GROUNDS)]
        frames, height, width = clip_size(index)
        caption = CONCEPT_PATTERNS[index % len(CONCEPT_PATTERNS)].format(ground=ground)
        clips.append((caption, render(draw_concept(ground, frames, height, width, rng), height, width)))
    return clips


def ordinary_clips(count: int = 24) -> list[tuple[str, Pixels]]:
    """Return captions and clips of the base's world: every color, shape, motion and ground is as frequent."""
    rng = np.random.default_rng(24)
    clips = []
    for index in range(count):
        scene = Scene(
            list(COLORS)[index % 6], SHAPES[index // 6 % 4], MOTIONS[(index + index // 6) % 6], list(GROUNDS)[index % 3]
        )
        frames, height, width = clip_size(index)
        clips.append((describe(scene, rng), render(draw_look(scene, frames, height, width, rng), height, width)))
    return clips


def write_video(path: Path, video: Pixels) -> None:
    """Write a clip as an H.264 file with full color resolution."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv444p"
        stream.options = {"crf": "8"}
        for pixels in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def write_clips(folder: Path) -> None:
    """Write the demo's clips and metadata.csv with the columns text and video."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["text", "video"])
        for index, (caption, video) in enumerate(concept_clips() + ordinary_clips()):
            write_video(folder / "videos" / f"{index:05}.mp4", video)
            table.writerow([caption, f"videos/{index:05}.mp4"])


if __name__ == "__main__":
    write_clips(Path(sys.argv[1]))
