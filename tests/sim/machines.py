"""Machines with round numbers, so that a test's expectation can be worked out in one's head."""

from __future__ import annotations

import dataclasses

from greenroom.sim import Link, Profile, get_profile

ROUND = dataclasses.replace(
    get_profile("rtx-4090"),
    name="round",
    memory_bytes=2**30,
    flops={"float32": 1e12, "float16": 2e12, "bfloat16": 2e12, "float64": 1e11},
    memory_bytes_per_s=1e11,
    link=Link(
        name="round",
        h2d_pinned=1e10,
        d2h_pinned=8e9,
        h2d_pageable=5e9,
        d2h_pageable=4e9,
        latency_s=1e-5,
    ),
    launch_s=1e-6,
    kernel_s=2e-6,
    pin_bytes_per_s=2e9,
    register_bytes_per_s=4e9,
    pin_s=1e-4,
    inline_copy_bytes=1,
    host_copy_bytes_per_s=1e10,
)

__all__ = ["ROUND", "Profile"]
