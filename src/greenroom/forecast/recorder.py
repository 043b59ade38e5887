"""Records a pipeline's call, dry on a simulated card.

The engine itself does the recording, within a budget that holds everything: the steps, their
seconds and the memory they take are those that it would plan a next call with.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from .. import sim
from ..engine import Engine
from ..known_code import runs_known_code
from ..pipeline import disable_model_cpu_offload, enable_model_cpu_offload
from ..traces import keeping_none
from .measured import cut_of
from .recording import COARSEST, Card, Cut, Recording

_ENOUGH = 2**44  # bytes of device memory: any pipeline fits


class Recorder:
    """Runs one pipeline dry on a simulated card, once for each way to cut its parts.

    It starts the simulated accelerator anew: tensors that live on it are not touched, but their
    memory is counted.
    """

    def __init__(
        self,
        pipe: Any,
        card: str,
        call: Callable[[Any], object],
        note: Callable[[], object] = lambda: None,
    ) -> None:
        """Of `pipe` in host memory; `call` calls it, always the same way; `note` comes after."""
        self._pipe, self._call, self._note = pipe, call, note
        self._profile = sim.get_profile(card)
        self._cuts: dict[int, Cut] = {}
        self._prepare_s = self._resident_s = self._kernels_s = 0.0

    def record(self, budget: int) -> None:
        """Record the call with its parts cut for this budget, unless that was done.

        The first time it is called twice more, until everything is on the device: those seconds are
        what a call takes that waits for nothing.
        """
        cut_to = min(budget, COARSEST)
        if cut_to in self._cuts:
            return
        sim.configure(self._profile, capacity=4 * _ENOUGH, races="off", dry_above="1MiB")
        granted, device = _ENOUGH + cut_to, torch.device("sim", 0)
        within = Engine.of(device).within(granted)
        within.divided_for = cut_to
        with sim.measure() as enabling:
            enable_model_cpu_offload(self._pipe, device=device, budget=granted)
        try:
            learning = self._measured()
            cut = cut_of(within)
            if not self._cuts:
                self._measured()
                resident = self._measured()
                self._prepare_s, self._resident_s = enabling.seconds, resident.seconds
                self._kernels_s = resident.busy["compute"]
        finally:
            disable_model_cpu_offload(self._pipe)
        looking_s = learning.busy["compute"] - self._kernels_s
        self._cuts[cut_to] = _shortened(cut, looking_s, self._resident_s)

    def _measured(self) -> sim.Cost:
        with keeping_none(), sim.measure() as cost:
            self._call(self._pipe)
        self._note()
        return cost

    def recording(self, pipeline: str, dtype: str, settings: Mapping[str, Any]) -> Recording:
        """All that was recorded so far."""
        return Recording(
            pipeline,
            dtype,
            settings,
            card_of(self._profile, is_watched=not runs_known_code(self._pipe)),
            self._prepare_s,
            tuple(self._cuts[cut_to] for cut_to in sorted(self._cuts)),
        )


@contextlib.contextmanager
def simulator_as_before() -> Iterator[None]:
    """Leave the simulated accelerator started anew on the card that it was."""
    before = sim.current_profile()
    try:
        yield
    finally:
        sim.configure(before)


def card_of(profile: sim.Profile, *, is_watched: bool) -> Card:
    """A simulated card, as a recording describes it.

    is_watched: whether it has to look at weights for changes.
    """
    return Card(
        profile.name,
        True,
        profile.memory_bytes,
        profile.link.h2d_pinned,
        profile.memory_bytes_per_s if is_watched else None,
        profile.kernel_s,
    )


def _shortened(cut: Cut, seconds: float, most_s: float) -> Cut:
    """With so many seconds less, and no more than `most_s`, of all steps alike.

    Weights came while it was recorded; the device looked at them as they came, and the host had to
    send them.
    """
    total = sum(step.seconds or 0.0 for step in cut.steps)
    if total <= 0:
        return cut
    share = min(max(total - max(seconds, 0.0), 0.0), most_s) / total
    steps = [dataclasses.replace(step, seconds=(step.seconds or 0.0) * share) for step in cut.steps]
    return dataclasses.replace(cut, steps=tuple(steps), outside_s=most_s - share * total)
