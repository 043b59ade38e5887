"""What the tests of offloading share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

import greenroom
import greenroom.sim as sim


@pytest.fixture
def installed() -> Iterator[None]:
    greenroom.install()
    yield
    greenroom.uninstall()


@pytest.fixture
def two_devices() -> Iterator[None]:
    sim.configure(devices=2)
    yield
    gc.collect()  # while the second is there: pipelines in cycles still have memory locked for it
