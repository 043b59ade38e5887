"""Calls as a log would tell them, with round numbers."""

from __future__ import annotations

from greenroom.observe.account import PartFacts, Report, make_report
from greenroom.observe.events import Call, Offloaded, Onloaded, Ran

MIB = 2**20

PARTS = {
    "encoder": PartFacts("encoder", 2 * MIB, 2 * MIB),
    "unet": PartFacts("unet", 1 * MIB, 1 * MIB),
    "unet.up": PartFacts("unet", 3 * MIB, 0),
}


def streamed() -> Call:
    """Within 6 MiB: the encoder is there and goes, a part of the UNet comes, is used, changes."""
    return Call(
        "Pipeline",
        "sim:0",
        6 * MIB,
        "returned",
        10.0,
        {"encoder": 2 * MIB, "unet": 1 * MIB, "stranger": 1 * MIB},
        7 * MIB,
        "unet.up",
        6.0,
        (
            Ran("encoder", 1, 0.0, 0.0, 0.0, 2.0, (), ("encoder",), MIB // 2),
            Ran("unet", 1, 2.0, 2.0, 2.0, 3.0, (), (), MIB // 4),
            Ran("unet.up", 0, 3.0, 3.5, 6.0, 9.0, ("unet.up",), (), 1 * MIB),
            Offloaded("encoder", 2 * MIB, 0, 3.0, 3.5, "room for 'unet.up' and what follows it"),
            Onloaded("unet.up", 3 * MIB, 1 * MIB, False, 3.5, 6.0, "it is needed now"),
            Offloaded("unet.up", 3 * MIB, 3 * MIB, 9.0, 9.5, "the call is over"),
            Onloaded("encoder", 2 * MIB, 2 * MIB, True, 9.5, 11.0, "the call is over"),
        ),
    )


def report() -> Report:
    return make_report(streamed(), PARTS)
