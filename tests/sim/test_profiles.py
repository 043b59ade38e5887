"""The table of cards: it is complete, sourced, and refuses what cannot be a card."""

import dataclasses
import math
import pickle
import re

import pytest
import torch

from greenroom.sim.profiles import (
    DTYPES,
    LINK_SOURCES,
    PCIE_3_X16,
    PCIE_4_X8,
    PCIE_4_X16,
    PCIE_5_X16,
    PCIE_5_X16_SERVER,
    PROFILES,
    Link,
    Profile,
    UnknownProfile,
    get_profile,
)

LINKS = (PCIE_3_X16, PCIE_4_X8, PCIE_4_X16, PCIE_5_X16, PCIE_5_X16_SERVER)
EVERY_CARD = pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
IMPOSSIBLE = pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "25e9", None, True])


def number_fields(kind: type) -> list[str]:
    others = ("name", "flops", "link", "sources")
    return [part.name for part in dataclasses.fields(kind) if part.name not in others]


class TestTable:
    def test_the_cards_are_these(self):
        assert list(PROFILES) == [
            "rtx-4060-laptop",
            "rtx-3060-12gb",
            "rtx-3090",
            "rtx-4080",
            "rtx-4090",
            "rtx-5090",
            "l4",
            "l40s",
            "a100-40gb",
            "a100-80gb",
            "h100-sxm",
            "h200",
        ]

    @EVERY_CARD
    def test_a_card_is_found_by_its_own_name(self, profile):
        assert get_profile(profile.name) is profile

    @EVERY_CARD
    def test_every_number_has_a_source(self, profile):
        assert set(profile.sources) == {*number_fields(Profile), "flops", "link"}
        for name, source in profile.sources.items():
            assert re.search(r"\w#\d|\w\.(com|eu|guru)/|assumption: ", source), name

    @pytest.mark.parametrize("link", LINKS, ids=lambda link: link.name)
    def test_every_link_says_where_each_kind_of_copy_comes_from(self, link):
        for part in ("pinned: ", "pageable: ", "latency: "):
            assert part in LINK_SOURCES[link.name]

    @EVERY_CARD
    def test_rates_are_for_dtypes_of_torch_and_the_usual_four_are_there(self, profile):
        assert {"float16", "bfloat16", "float32", "float64"} <= set(profile.flops) <= set(DTYPES)
        for dtype in profile.flops:
            assert isinstance(getattr(torch, dtype), torch.dtype)

    @EVERY_CARD
    def test_the_numbers_keep_their_order(self, profile):
        # A slipped unit (10^9 for 10^12, MB for MiB) breaks one of these.
        rates, link = profile.flops, profile.link
        assert rates["float64"] <= rates["float32"] < rates["float16"] <= rates["int8"]
        assert link.h2d_pageable < link.h2d_pinned < profile.memory_bytes_per_s
        assert link.d2h_pageable < link.d2h_pinned < profile.memory_bytes_per_s
        assert profile.memory_bytes_per_s < rates["float64"] * 64
        assert 7e9 < profile.memory_bytes < 200e9
        assert 1e-6 < profile.kernel_s < profile.launch_s < profile.pin_s < 1e-3
        assert 1e9 < profile.pin_bytes_per_s < profile.register_bytes_per_s < link.h2d_pinned
        assert 1e4 < profile.inline_copy_bytes < 1e6

    def test_only_cards_with_float8_tensor_cores_have_a_rate_for_it(self):
        without = {name for name, card in PROFILES.items() if "float8_e4m3fn" not in card.flops}
        assert without == {"rtx-3060-12gb", "rtx-3090", "a100-40gb", "a100-80gb"}


class TestNumbersOthersRelyOn:
    def test_rtx_4090(self):
        card = get_profile("rtx-4090")
        assert card.flops["float16"] == card.flops["bfloat16"] == 165e12
        assert card.memory_bytes_per_s == 1008e9
        assert card.memory_bytes == 24564 * 2**20
        assert card.link is PCIE_4_X16
        assert (card.link.h2d_pinned, card.link.d2h_pinned) == (25e9, 25e9)
        assert (card.link.h2d_pageable, card.link.d2h_pageable) == (11e9, 11e9)

    def test_rtx_4060_laptop(self):
        card = get_profile("rtx-4060-laptop")
        assert card.memory_bytes == 8188 * 2**20
        assert (card.link.h2d_pinned, card.link.d2h_pinned) == (12e9, 12e9)

    def test_h200(self):
        card = get_profile("h200")
        assert card.flops["float16"] == card.flops["bfloat16"] == 790e12
        assert card.memory_bytes_per_s == 4.3e12
        assert card.memory_bytes == 141_000_000_000
        assert (card.link.h2d_pinned, card.link.d2h_pinned) == (55e9, 55e9)
        assert card.link.d2h_pageable == 2.8e9


class TestUnknownName:
    @pytest.mark.parametrize(
        ("asked", "near"),
        [("rtx-4091", "rtx-4090"), ("RTX 4090", "rtx-4090"), ("a100_80gb", "a100-80gb")],
    )
    def test_the_error_names_the_near_miss_and_all_cards(self, asked, near):
        with pytest.raises(UnknownProfile, match=f"{asked!r}. Did you mean {near!r}") as caught:
            get_profile(asked)
        assert all(name in str(caught.value) for name in PROFILES)
        assert isinstance(caught.value, ValueError)

    def test_no_guess_is_made_when_nothing_is_near(self):
        with pytest.raises(UnknownProfile) as caught:
            get_profile("abacus")
        assert "Did you mean" not in str(caught.value)


class TestValidation:
    @IMPOSSIBLE
    @pytest.mark.parametrize("name", number_fields(Profile))
    def test_a_profile_refuses_what_is_no_positive_number(self, name, value):
        card = get_profile("rtx-4090")
        with pytest.raises(ValueError, match=f"'rtx-4090': {name} is .*; expected a positive"):
            dataclasses.replace(card, **{name: value})

    @IMPOSSIBLE
    @pytest.mark.parametrize("name", number_fields(Link))
    def test_a_link_refuses_what_is_no_positive_number(self, name, value):
        with pytest.raises(ValueError, match=f"'PCIe 4.0 x16': {name} is .*; expected a positive"):
            dataclasses.replace(PCIE_4_X16, **{name: value})

    @IMPOSSIBLE
    def test_a_rate_is_a_positive_number(self, value):
        with pytest.raises(ValueError, match=r"flops\['float16'\] is .*; expected a positive"):
            dataclasses.replace(get_profile("l4"), flops={"float16": value})

    def test_the_message_shows_the_value(self):
        with pytest.raises(ValueError, match=r"memory_bytes_per_s is -3\.0; expected"):
            dataclasses.replace(get_profile("l4"), memory_bytes_per_s=-3.0)

    def test_memory_is_counted_in_whole_bytes(self):
        with pytest.raises(ValueError, match="expected a positive whole number"):
            dataclasses.replace(get_profile("l4"), memory_bytes=24e9)

    def test_an_unknown_dtype_is_named_beside_the_known_ones(self):
        with pytest.raises(ValueError, match="'fp16'; expected one of float64, float32, float16"):
            dataclasses.replace(get_profile("l4"), flops={"fp16": 1e12})

    def test_a_card_computes_in_some_dtype(self):
        with pytest.raises(ValueError, match="flops is empty"):
            dataclasses.replace(get_profile("l4"), flops={})


class TestValue:
    def test_it_cannot_be_changed(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            get_profile("l4").memory_bytes = 1

    def test_a_changed_copy_leaves_the_table_alone(self):
        smaller = dataclasses.replace(get_profile("rtx-4090"), memory_bytes=16 * 2**30)
        assert smaller != get_profile("rtx-4090")
        assert get_profile("rtx-4090").memory_bytes == 24564 * 2**20

    @EVERY_CARD
    def test_equal_profiles_hash_alike_and_travel_between_processes(self, profile):
        copy = pickle.loads(pickle.dumps(profile))
        assert copy == profile
        assert hash(copy) == hash(profile)
