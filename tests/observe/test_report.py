"""Reports: sums of events, a table, advice that follows from the numbers."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from observe.calls import MIB, PARTS, report, streamed
from offload.own import Chain
from offload.small import Small
from rich.console import Console
from torch import nn

import greenroom
import greenroom.sim as sim
from greenroom.core.bound import Start, lower_bound
from greenroom.core.units import parse_bytes
from greenroom.grant import smallest_for
from greenroom.observe.account import ComponentReport, PartFacts, Report, make_report
from greenroom.observe.events import Call
from greenroom.observe.mapped import nbytes_in, ranges_now
from greenroom.zoo import call_kwargs, tiny


def test_events_add_up_by_component() -> None:
    made = report()
    assert made.components == (
        ComponentReport(
            "encoder",
            2 * MIB,
            forwards=1,
            compute_s=2.0,
            h2d_nbytes=2 * MIB,
            onloads=1,
            found_ahead=1,
            offloads=1,
            host_pinned_nbytes=2 * MIB,
        ),
        ComponentReport(
            "unet",
            4 * MIB,
            forwards=1,
            compute_s=4.0,
            stalled_s=3.0,
            clearing_s=0.5,
            h2d_nbytes=3 * MIB,
            pageable_nbytes=2 * MIB,
            d2h_nbytes=3 * MIB,
            onloads=1,
            demanded=1,
            offloads=1,
            host_pinned_nbytes=1 * MIB,
            host_pageable_nbytes=3 * MIB,
        ),
    )
    assert made.total.nbytes == 6 * MIB and made.total.compute_s == 6.0
    assert made.total.h2d_nbytes == 5 * MIB and made.total.stalled_s == 3.0


def test_what_is_known_is_said_and_nothing_else() -> None:
    assert report().advice == (
        "The device waited for weights in 30% of the time, most of it for unet (3.00 s).",
        "2.0 MiB came from host memory that was not page-locked, which is slow and holds the host "
        "up. greenroom locks it from call to call.",
        "3.0 MiB of weights changed on the device and came home (unet).",
        "The budget was exceeded by 1.0 MiB, at unet.up: a single step needs that much.",
        "A budget of 7.1 MiB would hold all weights.",
    )
    quiet = Call("Pipeline", "sim:0", 6 * MIB, "returned", 10.0, peak_nbytes=6 * MIB)
    assert make_report(quiet, PARTS).advice == ()
    full = dataclasses.replace(quiet, missed=3)
    assert "3 more events" in make_report(full, PARTS).advice[0]


def test_the_table_and_the_plain_values_say_the_same() -> None:
    made = report()
    text = str(made)
    assert "Pipeline on sim:0, returned after 10.00 s, within 6.0 MiB" in text
    assert "peak of device memory: 7.0 MiB, while unet.up ran from 6.00 s on" in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith(" unet ")]
    assert " ".join(row) == "unet 4.0 MiB 1 4.00 s 3.00 s 3.0 MiB 3.0 MiB 0 1 1 25%"
    assert "\x1b" not in text and "efficiency" not in text
    assert "host memory of the weights: 3.0 MiB page-locked, 3.0 MiB pageable" in text
    values = json.loads(json.dumps(made.to_dict()))
    assert values["peak_nbytes"] == 7 * MIB and values["efficiency"] is None
    assert [c["name"] for c in values["components"]] == ["encoder", "unet"]
    assert "events" not in values and values["resident_nbytes"] == 4 * MIB


def test_a_notebook_shows_the_table_and_no_name_breaks_the_page() -> None:
    odd = dataclasses.replace(streamed(), pipeline="</pre><script>alert(1)</script>&")
    shown = make_report(odd, PARTS)._repr_html_()
    (pre,) = ET.fromstring(f"<page>{shown}</page>")  # nothing but one element, and text in it
    assert (pre.tag, len(pre)) == ("pre", 0)
    assert pre.text == str(make_report(odd, PARTS)) and "unet" in pre.text


def test_a_shell_shows_a_line_and_not_every_event() -> None:
    assert repr(report()) == "<Report of Pipeline on sim:0, returned; print it>"


def test_a_narrow_terminal_gets_the_table_in_pieces_that_lack_nothing() -> None:
    printed = {}
    for width in (200, 60, 30):
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(report())
        printed[width] = console.file.getvalue()  # type: ignore[attr-defined]
    wide, half, narrow = printed.values()
    assert wide.count("component") == 1 and half.count("component") == 2 < narrow.count("component")
    for text in printed.values():
        assert "…" not in text
        for heading in ("weights", "forwards", "compute", "waited", "to device", "on demand"):
            assert text.count(heading) >= 1
    assert max(map(len, half.splitlines())) <= 60


def test_host_memory_is_told_by_its_kinds() -> None:
    parts = {**PARTS, "unet.up": PartFacts("unet", 3 * MIB, 0, 2 * MIB)}
    made = make_report(streamed(), parts)
    row = made.components[1]
    kinds = (row.host_pinned_nbytes, row.host_pageable_nbytes, row.host_mapped_nbytes)
    assert kinds == (MIB, MIB, 2 * MIB) and row.unlocked_nbytes == 3 * MIB
    assert "3.0 MiB page-locked, 1.0 MiB pageable, 2.0 MiB mapped from files" in str(made)


def test_weights_that_a_file_is_mapped_for_are_told_so(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(2**20))
    mapped = torch.from_file(str(tmp_path / "weights"), shared=False, size=2**18)
    assert nbytes_in(
        ranges_now(), [(mapped.data_ptr(), 2**20), (torch.ones(9).data_ptr(), 36)]
    ) == (2**20)
    pipe = Chain(first=nn.Linear(512, 512, bias=False), second=nn.Linear(512, 512, bias=False))
    pipe.first.weight.data = mapped.view(512, 512)
    greenroom.enable_model_cpu_offload(pipe, device="sim")
    with torch.no_grad():
        pipe(torch.ones(2, 512))
    rows = {row.name: row for row in greenroom.report(pipe).components}
    # At most as long as it lies where it was found.
    assert rows["first"].host_mapped_nbytes in (0, 2**20)
    assert rows["second"].host_mapped_nbytes == 0
    assert ranges_now(tmp_path / "no such list") == []


def test_efficiency_is_told_where_the_lower_bound_is_known() -> None:
    made = dataclasses.replace(report(), lower_bound_s=8.0)
    assert made.efficiency == 0.8
    assert "efficiency 80.0%: at least 8.00 s are needed" in str(made)


def test_memory_over_time_is_the_sum_of_what_was_there() -> None:
    story = report().story
    assert story.components == ("encoder", "unet", "other pipelines")
    sums = {level.at_s: sum(level.nbytes.values()) / MIB for level in story.levels}
    assert sums == {0.0: 4, 3.5: 5, 9.5: 4}
    assert story.beside == ((0.0, 2.0, MIB // 2), (2.0, 3.0, MIB // 4), (6.0, 9.0, MIB))
    assert story.stack.at_s == (0.0, 2.0, 3.0, 3.5, 6.0, 9.0, 9.5, 11.0)
    assert [n / MIB for n in story.stack.beside] == [0.5, 0.25, 0, 0, 1, 0, 0, 0]
    assert story.end_s == 11.0
    assert [(bar.label, bar.begin_s, bar.end_s) for bar in story.waits] == [("unet.up", 3.0, 6.0)]
    assert [bar.label for bar in story.d2h] == ["unet.up"]


# ---- of pipelines


def modules(pipe: Any) -> list[nn.Module]:
    return [m for m in pipe.components.values() if isinstance(m, nn.Module)]


@pytest.mark.slow
@pytest.mark.parametrize("share", [None, 0.6, 1.5])
def test_a_pipelines_report_has_the_simulators_numbers(share: float | None) -> None:
    gc.collect()
    pipe = tiny("sdxl")
    pipe.set_progress_bar_config(disable=True)
    nbytes = sum(p.nbytes for m in modules(pipe) for p in m.parameters())
    budget = None if share is None else int(share * nbytes) + 2**22
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget=budget)
    for _ in range(3):
        with sim.measure() as cost:
            pipe(**call_kwargs("sdxl"))
        made = greenroom.report(pipe)
        call, total = made.call, made.total
        assert call.peak_nbytes == pytest.approx(cost.peak_bytes, rel=0.02)
        assert total.h2d_nbytes == pytest.approx(cost.h2d_bytes, abs=2**16)
        assert total.d2h_nbytes == 0
        assert call.seconds is not None and call.seconds <= cost.seconds * 1.0001
        assert total.compute_s + total.stalled_s <= call.seconds * 1.0001
        assert total.compute_s > 0.5 * (cost.busy["compute"])
        assert [row.name for row in made.components][:2] == ["text_encoder", "text_encoder_2"]
        (unet,) = [row for row in made.components if row.name == "unet"]
        assert unet.forwards == call_kwargs("sdxl")["num_inference_steps"]
        most = max(sum(level.nbytes.values()) for level in made.story.levels)
        assert most <= cost.peak_bytes
        assert budget is None or most <= budget


@pytest.mark.slow
def test_the_budget_that_is_said_to_hold_all_weights_does() -> None:
    pipe = tiny("sdxl")
    pipe.set_progress_bar_config(disable=True)
    greenroom.enable_model_cpu_offload(pipe, device="sim")
    pipe(**call_kwargs("sdxl"))
    from greenroom.observe.account import _enough_for_all

    enough = _enough_for_all(greenroom.report(pipe))
    assert enough is not None
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget=enough)
    for _ in range(3):
        pipe(**call_kwargs("sdxl"))
    assert greenroom.report(pipe).total.h2d_nbytes == 0


@pytest.mark.slow
def test_within_a_budget_a_report_tells_the_bound_and_what_more_would_gain() -> None:
    def measured(budget: int) -> list[Report]:
        sim.configure()
        pipe = Small(width=2048, blocks=8)  # of 16 MiB, which take longer to copy than to compute
        greenroom.enable_model_cpu_offload(pipe, device="sim", budget=budget)
        made = []
        for _ in range(3):
            pipe(steps=4)
            made.append(greenroom.report(pipe))
        return made

    first, _, later = measured(96 * MIB)
    assert first.call.is_first and not later.call.is_first
    for made in (first, later):
        assert made.planned is not None and made.lower_bound_s is not None
        known, start = made.planned, Start.IN_A_ROW if made is later else Start.EMPTY
        bound = lower_bound(known.steps, known.sizes, known.usable_nbytes, known.costs, start)
        assert made.lower_bound_s == bound.seconds
        assert made.efficiency is not None and 0.5 < made.efficiency <= 1
        assert f"efficiency {made.efficiency:.1%}: at least" in str(made)
    outlook = later.outlook
    assert outlook is not None and outlook.bound_by == "link" and outlook.gain > 0.2
    (advice,) = [sentence for sentence in later.advice if "bound by the link" in sentence]
    enough = smallest_for(outlook.enough_nbytes)
    assert f"raise the budget to {enough}: {outlook.gain:.0%} left to gain" in advice
    assert json.loads(json.dumps(later.to_dict()))["outlook"]["bound_by"] == "link"

    *_, raised = measured(parse_bytes(enough.replace(" ", "")))
    assert raised.call.seconds is not None and later.call.seconds is not None
    gained = 1 - raised.call.seconds / later.call.seconds
    assert gained == pytest.approx(outlook.gain, abs=0.05)
    assert raised.outlook is not None and raised.outlook.bound_by == "compute"


def test_a_call_that_failed_or_has_no_budget_has_no_bound() -> None:
    pipe = Chain()
    for options in ({}, {"budget": "1MiB"}):
        greenroom.enable_model_cpu_offload(pipe, device="sim", **options)
        pipe(torch.ones(2, 8))
        assert (greenroom.report(pipe).efficiency is None) == (not options)
        with pytest.raises(RuntimeError):
            pipe(torch.ones(2, 5))
        assert greenroom.report(pipe).lower_bound_s is None
        assert greenroom.report(pipe).to_dict()["outlook"] is None


def test_what_was_never_offloaded_or_called_has_no_report() -> None:
    pipe = Chain()
    with pytest.raises(greenroom.UsageError, match="not offloaded by greenroom"):
        greenroom.report(pipe)
    greenroom.enable_model_cpu_offload(pipe, device="sim")
    with pytest.raises(greenroom.UsageError, match="no call -1 of this Chain"):
        greenroom.report(pipe)
    pipe(torch.ones(2, 8))
    assert greenroom.report(pipe).call.outcome == "returned"
    with pytest.raises(greenroom.UsageError, match="no call -2"):
        greenroom.report(pipe, -2)


def test_a_call_that_the_log_tells_is_a_value() -> None:
    assert streamed() == streamed()
    with pytest.raises(dataclasses.FrozenInstanceError):
        streamed().events[0].part = "x"  # type: ignore[misc]
