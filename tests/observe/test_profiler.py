"""torch's profiler shows what greenroom does; while none is active, nothing is done for it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from offload.small import Small
from torch.profiler import ProfilerActivity, profile

import greenroom
import greenroom.sim
from greenroom.device import labels


def enabled(**options: Any) -> Small:
    pipe = Small()
    greenroom.enable_model_cpu_offload(pipe, device="sim", **options)
    return pipe


def shown(pipe: Small) -> Counter[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        pipe()
    prefix = "greenroom::"
    return Counter(
        event.name.removeprefix(prefix)
        for event in profiled.events()
        if event.name.startswith(prefix)
    )


def test_each_onload_offload_and_wait_is_labelled_with_the_components_name() -> None:
    found = shown(enabled())
    for name in ("encoder", "denoiser", "decoder"):
        assert found[f"onload ({name})"] == found[f"offload ({name})"] == 1
        assert found[f"wait ({name})"] == 2  # for the copy, and for what has changed


def test_within_a_budget_a_part_has_its_full_name() -> None:
    pipe = enabled(budget="16KiB")
    found = shown(pipe)
    call = greenroom.report(pipe).call
    assert found["onload (denoiser.blocks.0)"] >= 1
    onloads = Counter(f"onload ({up.part.partition('#')[0]})" for up in call.onloads)
    assert Counter({name: n for name, n in found.items() if name in onloads}) == onloads


def test_no_label_is_made_while_no_profiler_is_active(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        pytest.fail(f"{name} was labelled")

    monkeypatch.setattr(labels._profiler, "record_function", refuse)
    pipe = enabled()
    pipe()
    assert labels.label("onload", "unet") is labels.label("wait", "vae")
