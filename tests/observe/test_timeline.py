"""Timelines: the structure of Perfetto's file, and the page in a browser."""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from observe.calls import MIB, PARTS, report

import greenroom
from greenroom import observe
from greenroom.observe.account import make_report
from greenroom.observe.events import Ran
from greenroom.observe.timeline import trace_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.fixture
def trace(tmp_path: Path) -> list[dict[str, Any]]:
    observe.write_timeline(report(), tmp_path / "timeline.json")
    found = json.loads((tmp_path / "timeline.json").read_text())
    assert found["displayTimeUnit"] == "ms"
    return found["traceEvents"]


def test_each_lane_has_its_bars_in_microseconds(trace: list[dict[str, Any]]) -> None:
    lanes = {e["tid"]: e["args"]["name"] for e in trace if e["name"] == "thread_name"}
    bars = [
        (lanes[e["tid"]], e["name"], e["ts"], e["ts"] + e["dur"]) for e in trace if e["ph"] == "X"
    ]
    assert bars == [
        ("compute", "encoder", 0, 2e6),
        ("compute", "unet", 2e6, 3e6),
        ("compute", "unet.up waits", 3e6, 6e6),
        ("compute", "unet.up", 6e6, 9e6),
        ("copies to the device", "unet.up", 3.5e6, 6e6),
        ("copies to the device", "encoder", 9.5e6, 11e6),
        ("copies home", "unet.up", 9e6, 9.5e6),
    ]
    (copy,) = [e for e in trace if e["ph"] == "X" and e["ts"] == 3.5e6]
    assert copy["args"] == {
        "component": "unet",
        "why": "it is needed now",
        "bytes": 3 * MIB,
        "of them page-locked": 1 * MIB,
    }
    (process,) = [e["args"]["name"] for e in trace if e["name"] == "process_name"]
    assert process == "Pipeline on sim:0"


def test_each_component_has_a_counter_of_bytes(trace: list[dict[str, Any]]) -> None:
    tracks: dict[str, list[tuple[float, int]]] = {}
    for e in trace:
        if e["ph"] == "C":
            tracks.setdefault(e["name"], []).append((e["ts"], e["args"]["bytes"]))
    assert tracks["memory: encoder"] == [(0, 2 * MIB), (3.5e6, 0), (9.5e6, 2 * MIB)]
    assert tracks["memory: unet"] == [(0, MIB), (3.5e6, 4 * MIB), (9.5e6, MIB)]
    assert tracks["memory: other pipelines"] == [(0, MIB)]
    assert tracks["memory: budget"] == [(0, 6 * MIB), (11e6, 6 * MIB)]
    assert set(tracks) == {f"memory: {n}" for n in (*report().story.components, *LAST)}


LAST = ("besides weights", "budget")


def test_bars_of_a_lane_never_overlap_whatever_times_are_rounded_to() -> None:
    # Perfetto takes a lane's bars for calls of one another, and drops what is neither in nor after.
    third = 1e-6 / 3
    runs = tuple(
        Ran("unet", 1, i * third, i * third, (i + 0.4) * third, (i + 1) * third) for i in range(50)
    )
    call = dataclasses.replace(report().call, events=runs, seconds=50 * third)
    events = trace_of({"": make_report(call, PARTS)})["traceEvents"]
    assert all(
        set(e) >= {"ph", "pid", "name"} and (e["ph"] == "M" or isinstance(e["ts"], float | int))
        for e in events
    )
    bars = sorted((e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X")
    assert len(bars) == 100 and all(dur >= 0 for *_, dur in bars)
    for (lane, ts, dur), (other, next_ts, _) in itertools.pairwise(bars):
        assert lane != other or round(ts + dur, 3) <= next_ts
    counters: dict[str, float] = {}
    for e in events:
        if e["ph"] == "C":
            assert e["ts"] >= counters.get(e["name"], 0.0) and e["args"]["bytes"] >= 0
            counters[e["name"]] = e["ts"]


def test_the_page_asks_no_server_and_no_name_breaks_it(tmp_path: Path) -> None:
    odd = dataclasses.replace(report().call, pipeline="</script><b>")
    observe.write_timeline(dataclasses.replace(report(), call=odd), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=|https?:|url\(|fetch\(", page)
    assert page.count("</script>") == 1


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(greenroom.UsageError, match=r"\.json or \.html, not as 'a\.txt'"):
        observe.write_timeline(report(), tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []


# ---- in a browser

# What a user does and sees, told in attributes of the page.
VISIT = """<script>
const said = document.documentElement.dataset, canvas = document.querySelector("canvas");
const box = canvas.getBoundingClientRect();
function at(kind, x, y, more) {
  const Kind = kind === "wheel" ? WheelEvent : kind === "dblclick" ? MouseEvent : PointerEvent;
  canvas.dispatchEvent(new Kind(kind, {clientX: box.left + x, clientY: box.top + y, ...more}));
}
function view_ms() { return [view.begin, view.end].map(us => Math.round(us / 1e3)).join(" "); }
const x_of = seconds => panels[0].x(seconds * 1e6);
said.whole = view_ms();
at("pointermove", x_of(1), MEMORY + GAP + 5); said.bar = tip.textContent;
at("pointermove", x_of(7), MEMORY - 5); said.memory = tip.textContent;
at("pointermove", x_of(10.5), MEMORY + GAP + 5); said.nothing = tip.style.display;
const dot = canvas.getContext("2d").getImageData(x_of(1), MEMORY + GAP + LANE / 2 + 4, 1, 1).data;
said.colour = [...dot].slice(0, 3).join(" ");
at("wheel", x_of(5), 50, {deltaY: -400}); said.zoomed = view_ms();
at("pointerdown", 400, 50, {pointerId: 1}); at("pointermove", 300, 50); at("pointerup", 300, 50);
said.moved = view_ms();
at("dblclick", 300, 50); said.again = view_ms();
said.legend = document.getElementById("legend").textContent;
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_the_page_draws_zooms_moves_and_tells_what_is_under_the_pointer(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    observe.write_timeline(report(), page)
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", VISIT), encoding="utf-8")
    done = subprocess.run(
        [
            *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,800"),
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(tmp_path)},
        check=False,
    )
    tag = re.search(r"<html[^>]*>", done.stdout, re.DOTALL)
    assert tag is not None, done.stderr
    said = {k: html.unescape(v) for k, v in re.findall(r'data-(\w+)="([^"]*)"', tag[0], re.DOTALL)}
    assert said["whole"] == "0 11055"
    assert said["bar"].splitlines()[:3] == ["encoder", "encoder", "0 µs to 2 s, 2 s"]
    assert "bytes beside weights: 512.0 KiB" in said["bar"]
    assert said["memory"].splitlines() == [
        *("7 s", "besides weights: 1.0 MiB", "other pipelines: 1.0 MiB"),
        *("unet: 4.0 MiB", "together: 6.0 MiB"),
    ]
    assert said["nothing"] == "none"
    assert said["colour"] == "230 159 0"
    begin, end = map(int, said["zoomed"].split())
    assert (end - begin) / 11055 == pytest.approx(0.368, abs=0.01)  # 1 / e
    assert begin < 5000 < end
    moved = int(said["moved"].split()[0])
    assert moved > begin
    assert said["again"] == said["whole"]
    for name in ("encoder", "unet", "other pipelines", "budget", "waiting for weights"):
        assert name in said["legend"]
