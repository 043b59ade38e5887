"""What is said about a machine, by its facts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from greenroom.doctor.host import Host
from greenroom.doctor.judge import Device, Facts, Level, Link, PageLocking, judge

GIB = 2**30
VERSIONS = {
    "torch": "2.13.0",
    "accelerate": "1.15.0",
    "diffusers": "0.42.1",
    "transformers": "5.23.0",
    "peft": "0.21.2",
}
HOST = Host(64 * GIB, 50 * GIB)
CARD = Device("cuda:0", "NVIDIA GeForce RTX 4090", 23 * GIB, 24 * GIB)
SOUND = Facts(
    HOST,
    device="cuda:0",
    devices=[CARD],
    link=Link(2**28, 25e9, 11e9, 25e9, 11e9),
    page_locking=PageLocking(2**28, 3.2e9),
    versions=VERSIONS,
    built_for="CUDA 12.8",
    driver="NVIDIA 570.86.10",
)
NO_DEVICE = replace(SOUND, device=None, devices=[], link=None, page_locking=None)


def without(name: str) -> dict[str, str | None]:
    return {**VERSIONS, name: None}


def test_a_sound_machine_has_nothing_said_about_it() -> None:
    assert judge(SOUND) == []


@pytest.mark.parametrize(
    ("facts", "what", "do"),
    [
        (replace(SOUND, versions=without("accelerate")), "accelerate is not inst", "pip install"),
        (
            replace(SOUND, versions={**VERSIONS, "accelerate": "0.16.0"}),
            "accelerate is 0.16.0, and greenroom needs 0.17.0",
            "pip install -U accelerate",
        ),
        (
            replace(NO_DEVICE, versions={**VERSIONS, "torch": "2.5.1+cu121"}),
            "torch is 2.5.1+cu121, and greenroom needs 2.6",
            "pip install -U torch",
        ),
        (replace(NO_DEVICE, built_for=None, driver=None), "no accelerator", "--simulate rtx-4090"),
        (replace(NO_DEVICE, built_for=None), "built for the CPU alone", "build of torch"),
        (replace(NO_DEVICE, driver=None), "no driver for it", "Install the accelerator's driver"),
        (NO_DEVICE, "finds no device, though there is a driver", "CUDA_VISIBLE_DEVICES"),
        (
            replace(SOUND, failure="CUDA error"),
            "Measuring cuda:0 failed: CUDA error",
            "plain torch",
        ),
        (
            replace(SOUND, devices=[replace(CARD, free_bytes=2**28)]),
            "Only 256.0 MiB of 24.0 GiB on cuda:0 are free",
            "Other programs",
        ),
        (
            replace(SOUND, page_locking=PageLocking(2**28, None)),
            "256.0 MiB of host memory could not be page-locked",
            "Leave more memory free.",
        ),
        (
            replace(
                SOUND,
                page_locking=PageLocking(2**28, None),
                host=replace(HOST, memlock_limit_bytes=2**16),
            ),
            "could not be page-locked",
            "`ulimit -l` is 64.0 KiB: raise it.",
        ),
        (
            replace(SOUND, host=replace(HOST, available_bytes=GIB)),
            "Only 1.0 GiB of host memory",
            "End other programs",
        ),
    ],
)
def test_troubles(facts: Facts, what: str, do: str) -> None:
    (finding,) = judge(facts)
    assert finding.level is Level.TROUBLE
    assert what in finding.what and do in finding.do


@pytest.mark.parametrize(
    ("facts", "what", "do"),
    [
        (replace(SOUND, versions=without("peft")), "It is for LoRA", "'greenroom[peft]'"),
        (replace(SOUND, versions=without("diffusers")), "`greenroom run`", "'greenroom[diffusers]"),
        (
            replace(SOUND, devices=[replace(CARD, free_bytes=8 * GIB)]),
            "Only 8.0 GiB of 24.0 GiB",
            "a budget below that",
        ),
        (replace(SOUND, link=Link(2**28, 1.5e9, 1e9, 1e9, 1e9)), "slow: 1.5 GB/s", "nvidia-smi"),
        (
            replace(SOUND, host=Host(64 * GIB, 7 * GIB, 8 * GIB)),
            "to 8.0 GiB of the machine's 64.0 GiB",
            "Count on 7.0 GiB",
        ),
        (replace(SOUND, host=replace(HOST, is_wsl=True)), "This is WSL", ".wslconfig"),
    ],
)
def test_notes(facts: Facts, what: str, do: str) -> None:
    (finding,) = judge(facts)
    assert finding.level is Level.NOTE
    assert what in finding.what and do in finding.do


@pytest.mark.parametrize(
    "facts",
    [
        replace(SOUND, devices=[CARD, replace(CARD, device="cuda:1", free_bytes=0)]),  # another one
        replace(SOUND, devices=[replace(CARD, free_bytes=None, total_bytes=None)]),
        replace(SOUND, versions={**VERSIONS, "accelerate": "our own build"}),
        replace(SOUND, link=Link(2**28, None, 11e9, None, 11e9)),
        replace(SOUND, host=replace(HOST, memlock_limit_bytes=2**16)),  # drivers do not ask for it
        replace(SOUND, link=None, page_locking=None),
    ],
)
def test_what_is_no_trouble(facts: Facts) -> None:
    assert judge(facts) == []


def test_troubles_come_first() -> None:
    facts = replace(
        SOUND, versions=without("peft"), host=replace(HOST, available_bytes=0, is_wsl=True)
    )
    assert [finding.level.value for finding in judge(facts)] == ["trouble", "note", "note"]
