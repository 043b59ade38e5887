"""What the engine orders for tiny pipelines, written down as text.

    python -m offload.golden sdxl flux   # in tests/: as JSON, by name; all without a name

A line is a step: what is about to run, and what is ordered before it. Steps before which nothing
is ordered share a line.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from unittest import mock

import diffusers
import torch
from pipelines.pictures import SIDE, mask, picture
from pipelines.reuse import of

import greenroom
import greenroom.sim as sim
from greenroom.core.director import Director, Orders
from greenroom.core.machine import Instruction, Machine, Needed, Onload
from greenroom.engine import Engine
from greenroom.pipeline import hook_of
from greenroom.zoo.tiny import call_kwargs, tiny

__all__ = ["GOLDEN", "text_of"]

MB = 10**6
_LEGEND = "# -gives up  ~releases  ^what comes waits for all before  +sends"
_LONGEST_ROUND = 100  # steps
_LINE = 10  # steps; two rounds of fewer are read as easily without a "2 x"
_WIDTH = 96

Steps: TypeAlias = Sequence[tuple[str, tuple[str, ...]]]  # what runs, what is ordered before


@dataclass(frozen=True)
class Golden:
    """Pipelines, a call of them all, and a budget that does not hold them."""

    budget: int
    build: Callable[[], list[Any]]
    call: Callable[[list[Any]], object]


# ---- the pipelines
# -------------------------------------------------------------------------------


def named(name: str, budget: float, *, steps: int, **changed: Any) -> Golden:
    """A pipeline of the zoo."""
    kwargs = call_kwargs(name) | {"num_inference_steps": steps} | changed
    return alone(lambda: tiny(name), budget, **kwargs)


def alone(build: Callable[[], Any], budget: float, **kwargs: Any) -> Golden:
    def call(pipes: list[Any]) -> None:
        pipes[0](**kwargs | {"generator": torch.Generator("cpu").manual_seed(0)})

    return Golden(int(budget * MB), lambda: [build()], call)


def refined() -> list[Any]:
    """A pipeline, and another one of its components that goes on where it stops."""
    base = tiny("sdxl")
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(base, add_watermarker=False)
    return [base, refiner]


def refine(pipes: list[Any]) -> None:
    base, refiner = pipes
    common = call_kwargs("sdxl") | {"num_inference_steps": 6}
    latents = base(**common | {"denoising_end": 0.5, "output_type": "latent"}).images
    del common["height"], common["width"]
    refiner(**common | {"image": latents, "denoising_start": 0.5})


def encode_apart(pipes: list[Any]) -> None:
    """Prompt and negative prompt are encoded before the call, one by one, as compel does it."""
    (pipe,) = pipes
    embeds = [
        pipe.encode_prompt(prompt, pipe._execution_device, 1, do_classifier_free_guidance=False)[0]
        for prompt in ("a red circle", "a green one")
    ]
    common = call_kwargs("sd") | {"num_inference_steps": 6, "prompt": None}
    pipe(**common, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])


def tiled() -> Any:
    pipe = tiny("sdxl")
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = SIDE // 2, SIDE // 4
    return pipe


PICTURE = {"prompt": "a red circle", "output_type": "pt", "image": picture(SIDE)}
GOLDEN = {
    "sdxl": named("sdxl", 5, steps=8),
    "sdxl-img2img": named("sdxl-img2img", 5, steps=12),
    "sdxl-inpaint": alone(
        of("StableDiffusionXLInpaintPipeline", "sdxl"),
        5,
        **PICTURE,
        mask_image=mask(),
        num_inference_steps=8,
        height=SIDE,
        width=SIDE,
    ),
    "sdxl-controlnet": named("sdxl-controlnet", 7, steps=6),
    "sdxl-refined": Golden(5 * MB, refined, refine),
    "sdxl-tiled": alone(tiled, 5, **call_kwargs("sdxl") | {"num_inference_steps": 3}),
    "sd-encoded-apart": Golden(4 * MB, lambda: [tiny("sd")], encode_apart),
    "flux": named("flux", 2.5, steps=28),
    # So small that the experts weigh more than what the decoder works on.
    "wan2.2": named("wan2.2", 1.2, steps=12, height=SIDE // 2, width=SIDE // 2),
}


# ---- what was ordered
# ----------------------------------------------------------------------------


@dataclass
class Orderly:
    """Steps of some calls, and what was ordered before each."""

    steps: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)

    def note(self, step: str, orders: Orders) -> None:
        """In the order in which they are carried out."""
        moves = [f"-{name}" for name in orders.offload]
        moves += [f"~{name}" for name in orders.release]
        moves += ["^"] if orders.settles else []
        moves += [f"+{name}" for name in orders.onload]
        self.steps.append((step, tuple(moves)))


@contextlib.contextmanager
def noted() -> Iterator[Orderly]:
    """Write down all that director and machine order meanwhile."""
    orderly = Orderly()
    begin, end_call, handle = Director.begin, Director.end_call, Machine.handle

    @functools.wraps(begin)
    def noted_begin(self: Director, step: Any) -> Orders:
        orders = begin(self, step)
        orderly.note(step.part, orders)
        return orders

    @functools.wraps(end_call)
    def noted_end_call(self: Director, **how: Any) -> Orders:
        orders = end_call(self, **how)
        orderly.note("(end)", orders)
        return orders

    @functools.wraps(handle)
    def noted_handle(self: Machine, event: Any) -> tuple[Instruction, ...]:
        instructions = handle(self, event)
        name = event.name if isinstance(event, Needed) else "(end)"
        if instructions or isinstance(event, Needed):
            sent = [isinstance(instruction, Onload) for instruction in instructions]
            assert sent == sorted(sent), "something is sent before something goes"
            gone = tuple(i.name for i in instructions if not isinstance(i, Onload))
            orderly.note(name, Orders(gone, tuple(i.name for i in instructions[len(gone) :])))
        return instructions

    with (
        mock.patch.object(Director, "begin", noted_begin),
        mock.patch.object(Director, "end_call", noted_end_call),
        mock.patch.object(Machine, "handle", noted_handle),
    ):
        yield orderly


# ---- text
# ----------------------------------------------------------------------------------------


def text_of(name: str) -> str:
    """The second call of a pipeline, without and within its budget."""
    golden = GOLDEN[name]
    paragraphs = [_LEGEND]
    for budget in (None, golden.budget):
        # An engine that knows nothing: no other components, no companions, no link's speed.
        with mock.patch.dict(Engine._engines, clear=True):
            parts, steps = second_call(golden, budget)
        within = "without a budget" if budget is None else f"within {budget / MB:g} MB"
        paragraphs.append(f"{name}, {within}: the second call\n\n{legend(parts)}")
        paragraphs.append(steps_text(shortened(steps, parts)))
    return "\n\n".join(paragraphs) + "\n"


def second_call(golden: Golden, budget: int | None) -> tuple[dict[str, int], Steps]:
    """All parts with their bytes, and what was ordered."""
    sim.configure("rtx-4090")
    pipes = golden.build()
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        greenroom.enable_model_cpu_offload(pipe, budget=budget)
    golden.call(pipes)
    with noted() as orderly:
        golden.call(pipes)
    parts = parts_of(pipes)
    for pipe in pipes:
        greenroom.disable_model_cpu_offload(pipe)
    return parts, orderly.steps


def parts_of(pipes: list[Any]) -> dict[str, int]:
    """Every part with its bytes, in the order of the components."""
    hooks = [hook_of(component) for pipe in pipes for component in pipe.components.values()]
    parts = (part for hook in hooks if hook is not None for part in hook.parts)
    return {part.key: part.store.nbytes for part in parts}


def short_names(parts: dict[str, int]) -> dict[str, str]:
    """A run of blocks is known by its number."""
    names: dict[str, str] = {}
    counts: dict[str, int] = {}
    for key in parts:
        assert "#" not in key, f"{key}: another component has the name"
        component = key.split(".")[0]
        if component in parts and key != component:
            counts[component] = counts.get(component, 0) + 1
            names[key] = f"{component}.{counts[component]}"
        else:
            names[key] = key
    return names


def legend(parts: dict[str, int]) -> str:
    names = short_names(parts)
    lines = []
    for key, nbytes in parts.items():
        inside = "" if names[key] == key else f"  {key.partition('.')[2]}"
        lines.append(f"  {names[key]:20}{nbytes:>9,} bytes{inside}".rstrip())
    return "\n".join(lines)


def shortened(steps: Steps, parts: dict[str, int]) -> Steps:
    names = short_names(parts)

    def short(text: str) -> str:
        sign, key = re.fullmatch(r"([-~+^]?)(.*)", text).groups()  # type: ignore[union-attr]
        return sign + names.get(key, key)

    return [(short(step), tuple(map(short, moves))) for step, moves in steps]


def steps_text(steps: Steps) -> str:
    """The steps line by line; of a round that is repeated as it is, the first one."""
    lines: list[str] = []
    for rounds, begin, end in folded(steps):
        inside = list(lines_of(steps[begin:end]))
        if rounds == 1:
            lines += inside
        elif len(inside) == 1:
            lines.append(f"{rounds} x {inside[0]}")
        else:
            lines += [f"{rounds} x", *(f"    {line}" for line in inside)]
    return "\n".join(lines)


def folded(steps: Steps) -> Iterator[tuple[int, int, int]]:
    """How often, from where to where: from the left, what covers the most in the shortest round."""
    i = plain = 0
    while i < len(steps):
        best, times = 0, 1
        for length in range(1, min(_LONGEST_ROUND, (len(steps) - i) // 2) + 1):
            rounds = 1
            while steps[i : i + length] == steps[i + rounds * length : i + (rounds + 1) * length]:
                rounds += 1
            is_worth_it = rounds > 2 or (rounds == 2 and length >= _LINE)
            if is_worth_it and rounds * length > times * best:
                best, times = length, rounds
        if times > 1:
            if plain < i:
                yield 1, plain, i
            yield times, i, i + best
            plain = i = i + times * best
        else:
            i += 1
    if plain < len(steps):
        yield 1, plain, len(steps)


def lines_of(steps: Steps) -> Iterator[str]:
    quiet: list[str] = []
    for step, moves in [*steps, ("", ("nothing",))]:
        if not moves:
            quiet.append(step)
            continue
        yield from textwrap.wrap(" ".join(quiet), _WIDTH, subsequent_indent=" " * 4)
        quiet = []
        if step:
            text = f"{step:15} {' '.join(moves)}"
            yield from textwrap.wrap(
                text, _WIDTH, subsequent_indent=" " * 16, break_on_hyphens=False
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: text_of(name) for name in sys.argv[1:] or GOLDEN}))
