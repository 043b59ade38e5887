"""The memory picture: it is a PNG, and its colours are where the memory was."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from observe.calls import MIB, report
from PIL import Image, ImageColor

from greenroom import observe
from greenroom.observe.style import BUDGET_COLOUR, COLOURS, WAIT_COLOUR


def share_of(picture: np.ndarray, colour: str) -> int:
    """How many pixels have nearly this colour."""
    away = np.abs(picture.astype(int) - ImageColor.getrgb(colour)).max(axis=-1)
    return int((away < 40).sum())


def test_each_component_has_its_area_and_the_budget_its_line(tmp_path: Path) -> None:
    observe.write_picture(report(), tmp_path / "memory.png")
    with Image.open(tmp_path / "memory.png") as image:
        assert image.format == "PNG"
        picture = np.asarray(image.convert("RGB"))
    assert share_of(picture, WAIT_COLOUR) > 100
    assert share_of(picture, BUDGET_COLOUR) > 50
    encoder, unet = (share_of(picture, colour) for colour in COLOURS[:2])
    # 2 MiB for 5 of 11 seconds, and 1 MiB for all of them with 3 more for 5.5.
    areas = (2 * (3.5 + 1.5), 1 * 11 + 3 * 5.5)
    assert encoder / unet == pytest.approx(areas[0] / areas[1], rel=0.35)  # lanes and legend too
    unbounded = dataclasses.replace(report().call, budget=None)
    observe.write_picture(dataclasses.replace(report(), call=unbounded), tmp_path / "no.png")
    with Image.open(tmp_path / "no.png") as image:
        assert share_of(np.asarray(image.convert("RGB")), BUDGET_COLOUR) == 0
    larger = dataclasses.replace(report().call, resident={"unet": 30 * MIB})
    both = {"as it was": report(), "larger": dataclasses.replace(report(), call=larger)}
    observe.write_picture(both, tmp_path / "both.png")
    with Image.open(tmp_path / "both.png") as image:
        assert image.height > picture.shape[0]


def test_the_same_report_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        observe.write_picture(report(), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_matplotlib_is_not_imported_before_it_draws() -> None:
    code = "import sys, greenroom; greenroom.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
