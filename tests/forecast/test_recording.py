"""Recordings: which of its cuts a budget goes by, and what a file keeps."""

from __future__ import annotations

import dataclasses
import io
import sys
import xml.etree.ElementTree as ET

import pytest

from greenroom.core.trace import Step
from greenroom.errors import UsageError
from greenroom.forecast import forecast_within
from greenroom.forecast.forecast import forecast
from greenroom.forecast.recording import Card, Cut, Recording

MIB = 2**20
CARD = Card("card", True, 64 * MIB, 1e9)


def cut(cut_to: int, parts: int, beside: int) -> Cut:
    """A component of 12 MiB in so many parts, which run one after the other."""
    sizes = {f"unet.{i}": 12 * MIB // parts for i in range(parts)}
    steps = tuple(Step(name, (), 1.2e-2 / parts, beside, opens=name == "unet.0") for name in sizes)
    return Cut(cut_to, sizes, steps, cast={"unet.0": MIB // 4})


def recording(*cuts: Cut) -> Recording:
    return Recording("Pipeline", "float16", {"width": 8}, CARD, None, cuts)


def test_a_budget_goes_by_the_nearest_cut_or_by_a_finer_one_that_it_has_room_for() -> None:
    fine, coarse = cut(2 * MIB, 12, MIB // 2), cut(16 * MIB, 2, MIB // 2)
    found = recording(fine, coarse)
    assert found.cut_for(2 * MIB) is fine
    assert found.cut_for(15 * MIB) is coarse
    assert coarse.least > 6 * MIB and found.cut_for(6 * MIB) is fine


def test_a_budget_that_the_engine_would_cut_finer_for_does_not_go_by_a_coarser_cut() -> None:
    # More beside the weights was measured with the finer cut: it happens.
    fine, coarse = cut(4 * MIB, 12, 4 * MIB), cut(16 * MIB, 3, MIB // 8)
    assert coarse.least < fine.least
    found = recording(fine, coarse)
    assert found.cut_for(coarse.least) is fine
    told = forecast(found, 16 * MIB)
    assert told.smallest.budget == fine.least
    assert not forecast(found, coarse.least).fits


def test_what_casts_add_is_in_the_file() -> None:
    mine = recording(cut(16 * MIB, 3, MIB))
    read = Recording.from_dict(mine.to_dict())
    assert read == mine
    assert forecast(read, 16 * MIB).to_dict() == forecast(mine, 16 * MIB).to_dict()
    (old,) = (content := mine.to_dict())["cuts"]
    del old["cast"]  # as files of before have it
    assert Recording.from_dict(content).cuts[0].cast == {}


def test_a_notebook_shows_the_tables_and_a_shell_a_line() -> None:
    odd = Recording("<b>&", "float16", {}, CARD, None, (cut(16 * MIB, 3, MIB),))
    told = forecast(odd, 16 * MIB)
    (pre,) = ET.fromstring(f"<page>{told._repr_html_()}</page>")
    assert (pre.tag, len(pre), pre.text) == ("pre", 0, str(told))
    assert repr(told) == "<Forecast of <b>& on card within 16.0 MiB; print it>"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("kind", "is_shown"), [(io.StringIO, False), (Terminal, True)])
def test_progress_is_shown_where_there_is_somebody_to_see_it(
    kind: type[io.StringIO], is_shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", kind())
    forecast_within(recording(cut(16 * MIB, 3, MIB)), "16MiB")
    assert ("planning" in sys.stderr.getvalue()) == is_shown  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("80%", "nobody said how much memory nameless has"),
        (None, "nobody said how much memory nameless has"),
        ("auto", "which nobody knows before"),
        ("12XB", "'12XB' is no size"),
    ],
)
def test_a_budget_that_is_none_is_refused(budget: str | None, said: str) -> None:
    nameless = dataclasses.replace(CARD, name="nameless", memory_nbytes=None)
    found = dataclasses.replace(recording(cut(16 * MIB, 3, MIB)), card=nameless)
    with pytest.raises(UsageError, match=said):
        forecast_within(found, budget)
    assert forecast_within(found, "16MiB").fits
