"""Where pipelines run: the machine's accelerator or a simulated card, measured alike."""

from __future__ import annotations

import pytest
import torch

import greenroom.sim as sim
from greenroom.errors import UsageError
from greenroom.place import Place, capacities, find_place

MIB = 2**20


def work(place: Place) -> None:
    big = torch.ones(MIB, device=place.device)
    (big + big).sum().cpu()


def test_a_simulated_card_is_measured_in_virtual_seconds_and_bytes() -> None:
    place = find_place("sim", "rtx-4090", "64MiB")
    assert str(place) == "a simulated rtx-4090 with 64.0 MiB"
    with place.measure() as cost:
        work(place)
    place.prepare()
    with sim.measure() as expected:
        work(place)
    assert cost.seconds == expected.seconds
    assert (cost.peak_bytes, cost.h2d_bytes, cost.d2h_bytes, cost.races) == (
        expected.peak_bytes,
        expected.h2d_bytes,
        expected.d2h_bytes,
        0,
    )
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(65 * MIB, dtype=torch.uint8, device=place.device)


def test_a_real_device_tells_its_peak_and_the_time_on_the_wall_and_no_more() -> None:
    # The simulated device, taken for a real one: it answers to the same functions of torch.
    place = Place(torch.device("sim", 0))
    place.prepare()
    with place.measure() as first:
        work(place)
    with place.measure() as second:
        torch.ones(1, device=place.device)
    assert first.peak_bytes is not None and first.peak_bytes >= 8 * MIB
    assert second.peak_bytes is not None and second.peak_bytes < MIB
    assert first.seconds > 0
    assert (first.h2d_bytes, first.d2h_bytes, first.races) == (None, None, None)


def test_without_a_word_the_accelerator_is_found() -> None:
    assert find_place().device == torch.device("sim", 0)  # the only one here


def test_a_second_device_is_simulated_where_it_is_asked_for() -> None:
    place = find_place("sim:1")
    with place.measure() as cost:
        work(place)
    assert cost.peak_bytes is not None and cost.peak_bytes >= 8 * MIB


def test_a_capacity_is_for_simulated_cards_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert find_place("cuda:1") == Place(torch.device("cuda", 1))
    assert find_place() == Place(torch.device("cuda", 0))
    for profile, capacity in (("rtx-4090", None), (None, "8GiB")):
        with pytest.raises(UsageError, match="for the simulated device, and the device is cuda"):
            find_place("cuda", profile, capacity)
    with pytest.raises(UsageError, match=r"'cuda:2' here\. There are: cuda:0, cuda:1, sim"):
        find_place("cuda:2")
    assert find_place(profile="rtx-4090").is_simulated


def test_computed_capacities_hold_the_largest_component_but_not_the_whole() -> None:
    sizes = {"text_encoder": 20 * MIB, "unet": 100 * MIB, "vae": 10 * MIB}
    found = list(capacities(sizes, most=1024 * MIB))
    assert found == [n * MIB for n in (115, 160, 340, 1060)]
    # A single component: nothing is too small for the whole that is not for the part.
    assert next(capacities({"unet": 100 * MIB}, most=0)) > 100 * MIB
