"""`greenroom doctor`, as somebody uses it whose pipeline is slow or does not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.usage import Command

from greenroom import sim
from greenroom.device.backend import Backend
from greenroom.doctor import probe
from greenroom.place import Place, find_place


@pytest.fixture(autouse=True)
def enough_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether the machine that runs the tests is full is not what they are about.
    roomy = probe.Host(64 * 2**30, 32 * 2**30)
    monkeypatch.setattr(probe, "read_host", lambda: roomy)


def found(done: Any) -> dict[str, Any]:
    assert done.err == ""
    return json.loads(done.out)


def test_a_simulated_card_is_measured_by_its_own_figures(greenroom_command: Command) -> None:
    done = greenroom_command("doctor", "--simulate", "rtx-4090", "--json")
    assert done.code == 0
    report = found(done)
    assert report["is_sound"] and report["findings"] == []
    assert (report["device"], report["simulated"]) == ("sim:0", "rtx-4090")
    card = sim.get_profile("rtx-4090")
    assert [device["total_bytes"] for device in report["devices"]] == [card.memory_bytes]
    # The latency of a copy, and of locking, takes less than a hundredth.
    for name in ("h2d_pinned", "h2d_pageable", "d2h_pinned", "d2h_pageable"):
        measured = report["link"][f"{name}_bytes_per_s"]
        assert measured == pytest.approx(getattr(card.link, name), rel=0.01)
    locking = report["page_locking"]["bytes_per_s"]
    assert locking == pytest.approx(card.register_bytes_per_s, rel=0.01)
    assert report["versions"]["torch"] == torch.__version__
    assert sim.races() == []


def test_virtual_figures_are_the_same_each_time(greenroom_command: Command) -> None:
    first, second = (
        found(greenroom_command("doctor", "--device", "sim", "--json")) for _ in range(2)
    )
    assert first == second
    assert first["simulated"] == "rtx-4060-laptop"


def test_people_read_a_table_and_that_nothing_is_wrong(greenroom_command: Command) -> None:
    done = greenroom_command("doctor", "--simulate", "h200")
    assert (done.code, done.err) == (0, "")
    for part in ("simulated h200", "page-locked", "GB/s", "ulimit -l", "32.0 GiB available of"):
        assert part in done.out
    assert done.out.rstrip().endswith("nothing is wrong")
    assert max(map(len, done.out.splitlines())) <= 100


def test_a_machine_without_an_accelerator_is_in_trouble(
    greenroom_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    monkeypatch.setattr(probe, "_driver", lambda: None)
    monkeypatch.setattr(probe, "_built_for", lambda: None)
    done = greenroom_command("doctor")
    assert done.code == 1
    assert "trouble: There is no accelerator" in done.out and "--simulate" in done.out
    report = found(greenroom_command("doctor", "--json"))
    assert (report["is_sound"], report["device"], report["link"]) == (False, None, None)


def test_memory_that_cannot_be_locked_is_a_trouble(
    greenroom_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backend, "pin", lambda *_: False)
    done = greenroom_command("doctor", "--simulate", "l4")
    assert done.code == 1
    assert "refused" in done.out and "trouble: 32.0 MiB of host memory could not be" in done.out


def prepared(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """Let the simulated card be found in some state."""

    def find(device: str | None, simulate: str | None) -> Place:
        place = find_place(device, simulate)
        if settings.get("fault") is not None:
            sim.fail(settings["fault"])
        else:
            sim.configure(place.profile or "", **settings)
        return place

    monkeypatch.setattr(probe, "find_place", find)


def test_what_cannot_be_pinned_is_left_out_of_the_table(
    greenroom_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(monkeypatch, pinned_capacity="1MiB")
    done = greenroom_command("doctor", "--device", "sim", "--json")
    assert done.code == 1
    report = found(done)
    assert report["link"]["h2d_pinned_bytes_per_s"] is None
    assert report["link"]["h2d_pageable_bytes_per_s"] > 1e9
    assert report["page_locking"]["bytes_per_s"] is None


def test_a_kind_of_device_without_page_locking_or_streams_is_no_trouble(
    greenroom_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backend, "can_pin", False)
    monkeypatch.setattr(Backend, "current_stream", lambda *_: None)
    done = greenroom_command("doctor", "--device", "sim", "--json")
    assert done.code == 0
    report = found(done)
    assert report["page_locking"] is None and report["link"]["h2d_pinned_bytes_per_s"] > 0
    assert "page-locking where it lies" not in greenroom_command("doctor", "--device", "sim").out


def test_the_chosen_one_of_several_devices_is_measured(greenroom_command: Command) -> None:
    report = found(greenroom_command("doctor", "--device", "sim:1", "--json"))
    assert report["device"] == "sim:1"
    assert [device["device"] for device in report["devices"]] == ["sim:0", "sim:1"]
    assert (sim.counters(0).h2d_copies, sim.counters(1).h2d_copies > 0) == (0, True)


@pytest.mark.parametrize("fault", ["copy", "device_alloc"])
def test_a_device_that_fails_is_told_of_with_its_own_words(
    fault: str, greenroom_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(monkeypatch, fault=fault)
    done = greenroom_command("doctor", "--device", "sim", "--json")
    assert done.code == 1
    (finding,) = found(done)["findings"]
    assert finding["what"].startswith("Measuring sim:0 failed: ")
    assert len(finding["what"].splitlines()) == 1


def test_a_device_without_room_is_told_of(
    greenroom_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(monkeypatch, capacity="1MiB")
    done = greenroom_command("doctor", "--device", "sim")
    assert done.code == 1
    assert "no room for a copy of 1.0 MiB" in " ".join(done.out.split())


def test_a_real_device_is_measured_several_times_and_the_best_is_told() -> None:
    # The simulated device, taken for a real one: it answers to the same functions of torch.
    place = Place(torch.device("sim", 0))
    sim.configure("rtx-4090")
    link = probe.measure_link(place, 2**24)
    assert link.h2d_pinned_bytes_per_s == pytest.approx(25e9, rel=0.1)
    assert sim.counters().h2d_copies == 1 + 2 * probe._REPEATS
    locking = probe.measure_page_locking(place, 2**24)
    assert locking.bytes_per_s is not None and locking.bytes_per_s > 0
    assert torch.sim.host_memory_stats()["allocated_bytes.current"] <= 2**24  # what is cached


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--simulate", "rtx-1"], "no profile is called 'rtx-1'"),
        (["--device", "cuda:7"], "there is no accelerator 'cuda:7'"),
        (["--device", "toaster"], "there is no accelerator 'toaster'"),
        (["--fast"], "no such option: --fast"),
        (["here"], "unexpected extra argument"),
    ],
)
def test_wrong_usage(arguments: list[str], reason: str, greenroom_command: Command) -> None:
    done = greenroom_command("doctor", *arguments)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith("greenroom: ") and reason in line


NVIDIA = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
    "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
)
NVIDIA_OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  560.35.03  Release Build  (dvs)\n"
)


@pytest.mark.parametrize(
    ("text", "version"),
    [(NVIDIA, "NVIDIA 550.54.15"), (NVIDIA_OPEN, "NVIDIA 560.35.03"), ("nothing of it", None)],
)
def test_drivers(text: str, version: str | None, tmp_path: Path) -> None:
    assert probe.parse_nvidia_version(text) == version
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(text, encoding="utf-8")
    if version is not None:
        assert probe._driver(tmp_path) == version
    (tmp_path / "sys/module/amdgpu").mkdir(parents=True)
    (tmp_path / "sys/module/amdgpu/version").write_text("6.10.5\n", encoding="utf-8")
    assert probe._driver(tmp_path) == (version or "amdgpu 6.10.5")
