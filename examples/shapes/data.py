"""The world of the pictures: coloured shapes on coloured grounds, and the words for them.

    scene = Scene((Thing("red", "circle"), Thing("blue", "square")), "above", "yellow")
    picture = draw(scene, random.Random(0))       # uint8, (64, 64, 3)
    scene.caption()                               # "a red circle above a blue square on yellow"

Everything random comes from the ``random.Random`` that is passed in, so the same seed draws the
same pictures. What is held out for the evaluation is a property of the scene, not of a list: four
scenes in a hundred, by their digest, and every scene with one of six pairs of colour and shape that
training never shows together.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64

COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 137, 32),
    "yellow": (252, 220, 60),
    "green": (46, 160, 72),
    "blue": (40, 92, 205),
    "purple": (140, 62, 178),
    "white": (250, 250, 250),
    "black": (24, 24, 28),
}
#: The ground of a prompt that names none.
PLAIN = "grey"
GROUNDS = {**COLOURS, PLAIN: (172, 176, 180)}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
#: Each relation with the one that says the same from the other side.
MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(MIRRORED)

#: Colour and shape that training never shows together, one pair of each shape.
UNSEEN_PAIRS = frozenset(
    {
        ("purple", "circle"),
        ("orange", "square"),
        ("blue", "triangle"),
        ("red", "diamond"),
        ("green", "star"),
        ("yellow", "cross"),
    }
)
HELD_OUT_SHARE = 0.04

# Every word that a caption of the training may contain.
WORDS = (
    *COLOURS,
    *SHAPES,
    *("grey", "gray", "left", "right", "above", "below", "over", "under", "of", "to", "the"),
    *("a", "an", "on", "and", "ground", "background", "picture", "drawing", "with"),
)

_SUPERSAMPLED = 4


@dataclass(frozen=True)
class Thing:
    """One coloured shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{_article(self.colour)} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a prompt says: one thing, or two in a relation, and the ground they are on."""

    things: tuple[Thing, ...]
    relation: str | None = None
    ground: str | None = None

    def caption(self, rng: random.Random | None = None) -> str:
        """The prompt; with ``rng``, one of the ways to word it."""
        words = str(self.things[0])
        if self.relation is not None:
            words += f" {_reword(self.relation, rng)} {self.things[1]}"
        if self.ground is not None:
            words += f" on {self.ground}"
            if rng is not None and rng.random() < 0.25:
                noun = rng.choice(("ground", "background"))
                words = words.replace(
                    f"on {self.ground}", f"on {_article(self.ground)} {self.ground} {noun}"
                )
        if rng is not None and rng.random() < 0.1:
            words = rng.choice(("a picture of ", "a drawing of ")) + words
        return words

    @property
    def ground_colour(self) -> str:
        return self.ground or PLAIN

    def key(self) -> str:
        """The same for scenes that show the same, from whichever side they are told."""
        things, relation = self.things, self.relation
        if relation in ("right of", "below"):
            things, relation = things[::-1], MIRRORED[relation]
        named = "/".join(f"{thing.colour} {thing.shape}" for thing in things)
        return f"{named}|{relation}|{self.ground_colour}"

    @property
    def has_unseen_pair(self) -> bool:
        return any((thing.colour, thing.shape) in UNSEEN_PAIRS for thing in self.things)

    @property
    def is_held_out(self) -> bool:
        digest = hashlib.sha256(self.key().encode()).digest()
        return self.has_unseen_pair or int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def random_scene(rng: random.Random) -> Scene:
    """Any scene, held out or not; two things in four of five."""
    ground = None if rng.random() < 0.15 else rng.choice(tuple(COLOURS))
    colours = [colour for colour in COLOURS if colour != ground]
    things = [Thing(rng.choice(colours), rng.choice(SHAPES))]
    if rng.random() < 0.2:
        return Scene((things[0],), None, ground)
    while len(things) < 2:
        other = Thing(rng.choice(colours), rng.choice(SHAPES))
        if other != things[0]:
            things.append(other)
    return Scene(tuple(things), rng.choice(RELATIONS), ground)


def training_scene(rng: random.Random) -> Scene:
    """A scene that is not held out."""
    while True:
        scene = random_scene(rng)
        if not scene.is_held_out:
            return scene


def held_out_scenes(count: int, seed: int, *, unseen_pair: bool) -> list[Scene]:
    """Different scenes of the hold-out, with or without a pair that training never showed."""
    rng, scenes = random.Random(seed), {}
    while len(scenes) < count:
        scene = random_scene(rng)
        if scene.is_held_out and scene.has_unseen_pair == unseen_pair:
            scenes.setdefault(scene.key(), scene)
    return list(scenes.values())


def draw(scene: Scene, rng: random.Random, *, outlined: bool = False) -> np.ndarray:
    """The scene as uint8, (SIZE, SIZE, 3); places and sizes vary within what the words leave open.

    ``outlined`` draws a line around each shape, in the first of black, white and grey that is
    neither the shape's colour nor the ground's.
    """
    scale = _SUPERSAMPLED
    image = Image.new("RGB", (SIZE * scale, SIZE * scale), GROUNDS[scene.ground_colour])
    canvas = ImageDraw.Draw(image)
    for thing, (x, y, radius) in zip(scene.things, _places(scene, rng), strict=True):
        corners = [
            ((x + radius * u) * scale, (y + radius * v) * scale) for u, v in OUTLINES[thing.shape]
        ]
        canvas.polygon(corners, fill=COLOURS[thing.colour])
        if outlined:
            line = outline_colour(thing.colour, scene.ground_colour)
            closed = [*corners, corners[0], corners[1]]
            canvas.line(closed, fill=GROUNDS[line], width=int(2.5 * scale), joint="curve")
    return np.asarray(image.reduce(scale))


def outline_colour(colour: str, ground: str) -> str:
    return next(line for line in ("black", "white", PLAIN) if line not in (colour, ground))


def _places(scene: Scene, rng: random.Random) -> list[tuple[float, float, float]]:
    """Centre and radius of each thing, in pixels; two never touch."""
    middle = SIZE / 2
    if scene.relation is None:
        return [
            (middle + rng.uniform(-4, 4), middle + rng.uniform(-4, 4), rng.uniform(13.0, 17.0)),
        ]
    places = []
    for side in (-1, 1) if scene.relation in ("left of", "above") else (1, -1):
        along = middle + 15 * side + rng.uniform(-2, 2)
        across = middle + rng.uniform(-4, 4)
        radius = rng.uniform(9.5, 11.5)
        x, y = (along, across) if scene.relation.endswith("of") else (across, along)
        places.append((x, y, radius))
    return places


def _regular(corners: int, turned: float = 0.0, radii: tuple[float, ...] = (1.0,)) -> list:
    """Corners on circles of the given radii in turn, the first at the top."""
    points = []
    for n in range(corners):
        angle = 2 * math.pi * n / corners + turned
        radius = radii[n % len(radii)]
        points.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return points


_ARM = 0.36
#: Corners of each shape around (0, 0), about as large to the eye as a circle of radius 1.
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _regular(48),
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -0.95), (1.08, 0.9), (-1.08, 0.9)],
    "diamond": [(0.0, -1.1), (0.95, 0.0), (0.0, 1.1), (-0.95, 0.0)],
    "star": _regular(10, radii=(1.12, 0.48)),
    "cross": [
        *((-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM)),
        *((_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM)),
    ],
}


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _reword(relation: str, rng: random.Random | None) -> str:
    if rng is None or rng.random() < 0.75:
        return relation
    return {
        "left of": "to the left of",
        "right of": "to the right of",
        "above": "over",
        "below": "under",
    }[relation]
