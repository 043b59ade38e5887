"""How many pictures show what their prompt says, on prompts that training never saw.

    python examples/shapes/evaluate.py --weights FOLDER --sheet sheet.png

The pictures are looked at with plain geometry that knows nothing of the model: each pixel is named
by the nearest colour, what is not ground falls into connected things, and each thing has the shape
whose outline, brought to the same bounding box, overlaps it most.
"""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from data import GROUNDS, OUTLINES, Scene, held_out_scenes
from PIL import Image, ImageDraw, ImageFont

STEPS = 20
GUIDANCE = 3.0

# Less than the smallest star's tip counts as dirt, more as a thing that was not asked for.
_SMALLEST_AREA = 30
_LEAST_OVERLAP = 0.65
_BOX = 32


@dataclass(frozen=True)
class Sighting:
    """A thing in a picture: its names, where its middle is, how well the shape's outline fits."""

    colour: str
    shape: str
    x: float
    y: float
    overlap: float


@dataclass(frozen=True)
class Verdict:
    """What of the prompt the picture shows."""

    shapes: bool
    colours: bool
    relation: bool
    ground: bool

    @property
    def things(self) -> bool:
        return self.shapes and self.colours

    @property
    def everything(self) -> bool:
        return self.things and self.relation and self.ground


def look(picture: np.ndarray) -> tuple[str, list[Sighting]]:
    """The colour of the ground and the things on it, of a uint8 picture (height, width, 3)."""
    names = list(GROUNDS)
    palette = np.array([GROUNDS[name] for name in names], np.int32)
    distance = ((picture.astype(np.int32)[:, :, None] - palette) ** 2).sum(-1)
    nearest = distance.argmin(-1)
    border = np.concatenate([nearest[:2].ravel(), nearest[-2:].ravel(), nearest[:, :2].ravel()])
    ground = np.bincount(border).argmax()
    sightings = []
    for thing in _connected(nearest != ground):
        if thing.sum() < _SMALLEST_AREA:
            continue
        colours = np.bincount(nearest[thing])
        colour = names[colours.argmax()] if 2 * colours.max() > thing.sum() else "mixed"
        shape, overlap = _shape_of(thing)
        ys, xs = thing.nonzero()
        sightings.append(Sighting(colour, shape, float(xs.mean()), float(ys.mean()), overlap))
    return names[ground], sightings


def judge(scene: Scene, picture: np.ndarray) -> Verdict:
    """Compare the picture with the scene; too many or too few things are wrong in every way."""
    ground, seen = look(picture)
    on_ground = ground == scene.ground_colour
    if len(seen) != len(scene.things):
        return Verdict(False, False, False, on_ground)

    def agreement(order: Sequence[Sighting]) -> tuple[int, int]:
        pairs = list(zip(scene.things, order, strict=True))
        shapes = sum(thing.shape == sighting.shape for thing, sighting in pairs)
        return shapes, sum(thing.colour == sighting.colour for thing, sighting in pairs)

    order = max(seen, seen[::-1], key=lambda order: sum(agreement(order)))
    shapes, colours = agreement(order)
    count = len(scene.things)
    return Verdict(
        shapes=shapes == count,
        colours=colours == count,
        relation=scene.relation is None or _stand(order, scene.relation),
        ground=on_ground,
    )


def _stand(order: Sequence[Sighting], relation: str) -> bool:
    right, down = order[1].x - order[0].x, order[1].y - order[0].y
    if relation in ("left of", "right of"):
        return abs(right) > abs(down) and (right > 0) == (relation == "left of")
    return abs(down) > abs(right) and (down > 0) == (relation == "above")


def _connected(mask: np.ndarray) -> list[np.ndarray]:
    """The parts of the mask that hang together by their pixels' sides."""
    left, parts = mask.copy(), []
    while left.any():
        part = np.zeros_like(mask)
        front = [tuple(np.argwhere(left)[0])]
        left[front[0]] = False
        while front:
            y, x = front.pop()
            part[y, x] = True
            for beside in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= beside[0] < mask.shape[0] and 0 <= beside[1] < mask.shape[1]
                if inside and left[beside]:
                    left[beside] = False
                    front.append(beside)
        parts.append(part)
    return parts


def _shape_of(thing: np.ndarray) -> tuple[str, float]:
    """The shape with the largest intersection over union, both filling the same box."""
    ys, xs = thing.nonzero()
    box = thing[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    rows = np.arange(_BOX) * box.shape[0] // _BOX
    columns = np.arange(_BOX) * box.shape[1] // _BOX
    filled = box[rows][:, columns]
    overlaps = {
        shape: float((filled & outline).sum() / (filled | outline).sum())
        for shape, outline in _OUTLINES.items()
    }
    shape = max(overlaps, key=lambda name: overlaps[name])
    known = overlaps[shape] >= _LEAST_OVERLAP
    return (shape if known else "unknown"), overlaps[shape]


def _filled(corners: list[tuple[float, float]]) -> np.ndarray:
    points = np.array(corners)
    low, high = points.min(0), points.max(0)
    scaled = (points - low) / (high - low) * (8 * _BOX)
    image = Image.new("L", (8 * _BOX, 8 * _BOX))
    ImageDraw.Draw(image).polygon([tuple(point) for point in scaled], fill=255)
    return np.asarray(image.reduce(8)) > 127


_OUTLINES = {shape: _filled(corners) for shape, corners in OUTLINES.items()}


def pictures_of(
    pipe: Any, prompts: Sequence[str], seed: int, *, steps: int = STEPS, guidance: float = GUIDANCE
) -> list[np.ndarray]:
    """One picture of each prompt, the nth from the seed ``seed + n``."""
    import torch

    pictures: list[np.ndarray] = []
    for start in range(0, len(prompts), 25):
        some = list(prompts[start : start + 25])
        seeds = range(seed + start, seed + start + len(some))
        images = pipe(
            some,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(n) for n in seeds],
        ).images
        pictures += [np.asarray(image) for image in images]
    return pictures


def contact_sheet(
    scenes: Sequence[Scene], pictures: Sequence[np.ndarray], columns: int = 8
) -> Image.Image:
    """The pictures twice as large above their prompts; a red frame where something is wrong."""
    side, text, gap = 128, 44, 8
    rows = -(-len(scenes) // columns)
    sheet = Image.new(
        "RGB", (columns * (side + gap) + gap, rows * (side + text + gap) + gap), "white"
    )
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for n, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
        x = gap + (n % columns) * (side + gap)
        y = gap + (n // columns) * (side + text + gap)
        fine = judge(scene, picture).everything
        frame = (200, 200, 200) if fine else (230, 0, 0)
        canvas.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline=frame, width=2)
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS), (x, y))
        lines = textwrap.wrap(scene.caption(), 25)
        canvas.multiline_text((x, y + side + 3), "\n".join(lines), fill="black", font=font)
    return sheet


def shares(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The share of pictures that are right in each way, in per cent."""
    counts: Counter[str] = Counter()
    for verdict in verdicts:
        rights = {**asdict(verdict), "things": verdict.things, "everything": verdict.everything}
        counts.update(name for name, right in rights.items() if right)
    ways = ("shapes", "colours", "things", "relation", "ground", "everything")
    return {way: round(100 * counts[way] / len(verdicts), 1) for way in ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sheet", type=Path, help="write the first pictures here, as one PNG")
    parser.add_argument("--report", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(options.weights).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    figures: dict[str, Any] = {
        "count": options.count,
        "seed": options.seed,
        "steps": options.steps,
        "guidance": options.guidance,
    }
    shown: list[tuple[Scene, np.ndarray]] = []
    for kind, unseen_pair in (("unseen scenes", False), ("unseen pairs", True)):
        scenes = held_out_scenes(options.count, options.seed, unseen_pair=unseen_pair)
        pictures = pictures_of(
            pipe,
            [scene.caption() for scene in scenes],
            options.seed,
            steps=options.steps,
            guidance=options.guidance,
        )
        figures[kind] = shares([judge(*pair) for pair in zip(scenes, pictures, strict=True)])
        print(kind, figures[kind])
        shown += list(zip(scenes, pictures, strict=True))[:24]
    if options.sheet is not None:
        contact_sheet(*zip(*shown, strict=True)).save(options.sheet, optimize=True)
    if options.report is not None:
        options.report.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
