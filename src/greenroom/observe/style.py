"""What pictures and timelines have in common: names and colours."""

from __future__ import annotations

from collections.abc import Sequence

from .story import OTHERS, Story

#: Okabe and Ito's colours, which people who see fewer colours can tell apart; ordered so that
#: neighbours in a stack differ. https://jfly.uni-koeln.de/color/
COLOURS = ("#E69F00", "#009E73", "#0072B2", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
BESIDE_COLOUR, OTHERS_COLOUR = "#C9CDD2", "#8A8F98"
WAIT_COLOUR, BUDGET_COLOUR = "#E8A0A0", "#B00020"
BESIDE = "besides weights"
WAITING = "waiting for weights"


def colours_of(stories: Sequence[Story]) -> dict[str, str]:
    """A colour for each component, the same in all of them."""
    names = dict.fromkeys(name for story in stories for name in story.components)
    plain = [name for name in names if name != OTHERS]
    found = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(plain)}
    return {**found, OTHERS: OTHERS_COLOUR}
