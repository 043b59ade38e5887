"""What pipelines of every kind return is compared to the bit and written whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils import BaseOutput
from PIL import Image

from greenroom.answer import Answer, check_output
from greenroom.errors import UsageError


class Output(BaseOutput):
    """An output object of diffusers with whatever fields."""


def pictures(count: int, side: int = 4) -> np.ndarray:
    return np.linspace(0, 1, count * side * side * 3, dtype=np.float32).reshape(
        count, side, side, 3
    )


def test_tensors_arrays_pictures_and_lists_of_them_become_arrays() -> None:
    picture = Image.new("RGB", (5, 4))
    answer = Answer.of(
        Output(
            images=[picture, picture],
            frames=pictures(3)[None],
            latents=torch.ones(2, dtype=torch.bfloat16),
            nsfw_content_detected=[False, False],
            nothing=None,
        )
    )
    assert {name: array.shape for name, array in answer.arrays.items()} == {
        "images": (2, 4, 5, 3),
        "frames": (1, 3, 4, 4, 3),
        "latents": (2,),
    }


def test_answers_are_the_same_only_to_the_last_bit() -> None:
    zero = np.zeros(3, dtype=np.float32)
    nan = np.full(3, np.nan, dtype=np.float32)
    assert Answer({"a": nan}).is_same(Answer({"a": nan.copy()}))
    assert not Answer({"a": zero}).is_same(Answer({"a": -zero}))
    assert not Answer({"a": zero}).is_same(Answer({"a": zero.astype(np.float64)}))
    assert not Answer({"a": zero}).is_same(Answer({"a": zero.reshape(3, 1)}))
    assert not Answer({"a": zero}).is_same(Answer({"b": zero}))
    assert Answer({"a": zero}).is_finite and not Answer({"a": nan}).is_finite


@pytest.mark.parametrize("name", ["images", "image", "frames"])
def test_pictures_are_found_by_any_name_that_diffusers_gives_them(
    name: str, tmp_path: Path
) -> None:
    answer = Answer({name: pictures(1), "audio": np.ones((1, 9))})
    assert answer.shown == [name]
    assert answer.write(tmp_path / "a.png") == [tmp_path / "a.png"]


def test_several_pictures_get_numbers(tmp_path: Path) -> None:
    answer = Answer({"images": pictures(3)})
    assert answer.write(tmp_path / "a.png") == [tmp_path / f"a-{n}.png" for n in (1, 2, 3)]
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "a-2.png")), (pictures(3)[1] * 255).round()
    )


def test_grey_pictures_are_written_grey(tmp_path: Path) -> None:
    (path,) = Answer({"images": pictures(1)[..., :1]}).write(tmp_path / "a.png")
    assert Image.open(path).mode == "L"


def test_the_frames_of_a_film_stand_in_rows_on_a_sheet(tmp_path: Path) -> None:
    frames = np.stack([np.full((2, 2, 3), n / 255, dtype=np.float32) for n in range(1, 6)])
    (path,) = Answer({"frames": frames[None]}).write(tmp_path / "a.png")
    sheet = np.asarray(Image.open(path))[::2, ::2, 0]
    assert sheet.tolist() == [[1, 2, 3], [4, 5, 0]]


def test_sound_and_embeddings_are_written_as_arrays_whatever_the_name(tmp_path: Path) -> None:
    sound = np.ones((1, 16), dtype=np.float32)
    (path,) = Answer({"audios": sound}).write(tmp_path / "a.png")
    assert path == tmp_path / "a.npz"
    assert np.array_equal(np.load(path)["audios"], sound)


def test_a_file_that_cannot_be_completed_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tmp_path / "a.png"
    before.write_bytes(b"a picture from before")

    def break_off(self: Image.Image, file: object, *_: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", break_off)
    with pytest.raises(OSError, match="no space"):
        Answer({"images": pictures(1)}).write(before)
    assert before.read_bytes() == b"a picture from before"
    assert list(tmp_path.iterdir()) == [before]


def test_a_file_that_could_not_be_written_is_refused_beforehand(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    for name in ("a.mp4", "a", "nowhere/a.png", "folder.png"):
        with pytest.raises(UsageError, match=name.partition("/")[0]):
            check_output(tmp_path / name)
    for name in ("a.png", "a.JPG", "a.gif", "a.npz"):
        check_output(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]
