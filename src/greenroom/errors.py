"""What greenroom raises. Each message says what was asked, what was true and what to do."""

from __future__ import annotations

from torch import OutOfMemoryError


class GreenroomError(Exception):
    """Everything that greenroom raises by itself."""


class UsageError(GreenroomError, ValueError):
    """The caller asked for something that cannot be: nothing has been touched."""


class BudgetTooSmall(UsageError):
    """Something that has to be on the device at once is larger than the budget.

    The message names the smallest that would do.
    """


class NoAcceleratorError(GreenroomError, RuntimeError):
    """There is no device to run on."""


class DeviceOutOfMemory(GreenroomError, OutOfMemoryError):
    """The device has no room for a forward, whatever else was sent home.

    A `torch.OutOfMemoryError`: whoever catches that catches this.
    """


class WeightsError(GreenroomError, RuntimeError):
    """A component's weights cannot be moved as they are."""
