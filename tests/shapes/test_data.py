"""The pictures that the shapes pipeline learns from, their captions, and the judge of both."""

from __future__ import annotations

import dataclasses
import random

import data
import evaluate
import numpy as np
import parts
import pytest


def pictures(seed: int, count: int = 40, *, outlined: bool = False) -> list[np.ndarray]:
    rng = random.Random(seed)
    return [data.draw(data.random_scene(rng), rng, outlined=outlined) for _ in range(count)]


def test_the_same_seed_draws_the_same_pictures_and_another_seed_others() -> None:
    assert all(map(np.array_equal, pictures(0), pictures(0)))
    assert not any(map(np.array_equal, pictures(0), pictures(1)))


def test_a_scene_told_from_the_other_side_is_held_out_alike() -> None:
    rng = random.Random(0)
    scenes = [scene for scene in (data.random_scene(rng) for _ in range(3000)) if scene.relation]
    for scene in scenes:
        told_back = dataclasses.replace(
            scene, things=scene.things[::-1], relation=data.MIRRORED[scene.relation]
        )
        assert told_back.key() == scene.key()
        assert told_back.is_held_out == scene.is_held_out


def test_training_never_sees_what_is_held_out() -> None:
    rng = random.Random(1)
    trained = {data.training_scene(rng).key() for _ in range(3000)}
    for unseen_pair in (False, True):
        held_out = data.held_out_scenes(200, 0, unseen_pair=unseen_pair)
        assert len({scene.key() for scene in held_out}) == 200
        assert trained.isdisjoint(scene.key() for scene in held_out)
        assert all(scene.has_unseen_pair == unseen_pair for scene in held_out)
    assert {shape for _, shape in data.UNSEEN_PAIRS} == set(data.SHAPES)


def test_each_word_of_a_caption_is_one_token_and_every_caption_fits() -> None:
    tokenizer, rng = parts.tokenizer(), random.Random(2)
    for _ in range(500):
        caption = data.random_scene(rng).caption(rng)
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2  # start and end of text
        assert len(ids) <= parts.MAX_TOKENS


def test_the_judge_finds_everything_right_in_what_was_drawn() -> None:
    rng = random.Random(3)
    for _ in range(150):
        scene = data.random_scene(rng)
        assert evaluate.judge(scene, data.draw(scene, rng)).everything, scene


SCENE = data.Scene((data.Thing("red", "circle"), data.Thing("blue", "square")), "left of", "yellow")


@pytest.mark.parametrize(
    ("drawn", "wrong"),
    [
        ({"relation": "right of"}, {"relation"}),
        ({"relation": "above"}, {"relation"}),
        ({"ground": "green"}, {"ground"}),
        ({"things": (data.Thing("red", "circle"), data.Thing("blue", "cross"))}, {"shapes"}),
        ({"things": (data.Thing("red", "circle"), data.Thing("black", "square"))}, {"colours"}),
        ({"things": SCENE.things[:1], "relation": None}, {"shapes", "colours", "relation"}),
    ],
)
def test_the_judge_says_what_is_wrong(drawn: dict[str, object], wrong: set[str]) -> None:
    picture = data.draw(dataclasses.replace(SCENE, **drawn), random.Random(0))
    verdict = dataclasses.asdict(evaluate.judge(SCENE, picture))
    assert {way for way, right in verdict.items() if not right} == wrong


def test_a_line_in_a_colour_of_its_own_runs_around_each_outlined_shape() -> None:
    rng = random.Random(4)
    for _ in range(40):
        scene = data.random_scene(rng)
        place = rng.getrandbits(32)
        plain = data.draw(scene, random.Random(place))
        outlined = data.draw(scene, random.Random(place), outlined=True)
        for thing in scene.things:
            line = data.outline_colour(thing.colour, scene.ground_colour)
            assert line not in (thing.colour, scene.ground_colour)
            new = (outlined == data.GROUNDS[line]).all(-1) & (plain != data.GROUNDS[line]).any(-1)
            assert new.sum() > 30
