"""Draws a table of states as SVG: {(state, event): (next state, instruction)}.

States stand on an ellipse in the order of their enumeration, so that a cycle reads as one; those
that lead nowhere else stand below. Every arrow bends to its left: two that go opposite ways
lie apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from html import escape

Table = Mapping[tuple[Enum, type], tuple[Enum, type | None]]

WIDTH, HEIGHT = 760, 430
CENTRE_X, CENTRE_Y, RADIUS_X, RADIUS_Y = WIDTH / 2, 190, 300, 125
BOX_W, BOX_H = 116, 38
BEND = 34  # how far from the straight line an arrow's middle lies


def draw(table: Table) -> str:
    """The states as boxes, the moves as arrows with their event and instruction."""
    at = _places(table)
    arrows: dict[tuple[Enum, Enum], list[str]] = {}
    for (state, event), (after, instruction) in table.items():
        label = event.__name__ + (f" / {instruction.__name__}" if instruction is not None else "")
        arrows.setdefault((state, after), []).append(label)
    parts = [_loop(at[a], labels) for (a, b), labels in arrows.items() if a is b]
    parts += [_arrow(at[a], at[b], labels) for (a, b), labels in arrows.items() if a is not b]
    parts += [_box(state, place) for state, place in at.items()]
    return (
        f'<svg class="states" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="The states of a component and the moves between them">'
        '<defs><marker id="states-tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        'markerHeight="7" orient="auto-start-reverse"><path d="M0 0L10 5L0 10z"/></marker></defs>'
        + "".join(parts)
        + "</svg>"
    )


def describe(table: Table) -> str:
    """The same as a table in Markdown."""
    lines = ["| a component that is | and is told | becomes | and greenroom |", "|---|---|---|---|"]
    for (state, event), (after, instruction) in table.items():
        does = f"carries out `{instruction.__name__}`" if instruction is not None else ""
        becomes = state.value if after is state else f"**{after.value}**"
        lines.append(f"| {state.value} | `{event.__name__}` | {becomes} | {does} |")
    return "\n".join(lines)


def _places(table: Table) -> dict[Enum, tuple[float, float]]:
    states = list(dict.fromkeys([state for state, _ in table] + [to for to, _ in table.values()]))
    moving = {s for (a, _), (b, _) in table.items() if a is not b for s in (a, b)}
    ring = [state for state in states if state in moving]
    rest = [state for state in states if state not in moving]
    at = {}
    for number, state in enumerate(ring):
        angle = 2 * math.pi * number / len(ring) - 3 * math.pi / 4
        at[state] = (
            CENTRE_X + RADIUS_X * math.cos(angle),
            CENTRE_Y + RADIUS_Y * math.sin(angle),
        )
    for number, state in enumerate(rest, 1):
        at[state] = (WIDTH * number / (len(rest) + 1), HEIGHT - BOX_H)
    return at


def _box(state: Enum, place: tuple[float, float]) -> str:
    x, y = place
    return (
        f'<rect x="{x - BOX_W / 2:.0f}" y="{y - BOX_H / 2:.0f}" width="{BOX_W}" height="{BOX_H}" '
        f'rx="8"/><text class="state" x="{x:.0f}" y="{y:.0f}">{escape(str(state.value))}</text>'
    )


def _arrow(start: tuple[float, float], end: tuple[float, float], labels: list[str]) -> str:
    (ax, ay), (bx, by) = start, end
    length = math.hypot(bx - ax, by - ay)
    # To the left of the way, as one sees it on a screen, where y grows downwards.
    side_x, side_y = (by - ay) / length, -(bx - ax) / length
    mx, my = (ax + bx) / 2 + BEND * side_x, (ay + by) / 2 + BEND * side_y
    a, b = _edge(start, (mx, my)), _edge(end, (mx, my))
    lift = 16 if abs(side_y) > abs(side_x) else 12
    anchor = "middle" if abs(side_y) > abs(side_x) else "start" if side_x > 0 else "end"
    # The curve goes half-way to its control point: the label is beyond that.
    x, y = mx - (BEND / 2 - lift) * side_x, my - (BEND / 2 - lift) * side_y
    return (
        f'<path d="M{a[0]:.0f} {a[1]:.0f}Q{mx:.0f} {my:.0f} {b[0]:.0f} {b[1]:.0f}" '
        f'marker-end="url(#states-tip)"/>' + _text(x, y, labels, anchor)
    )


def _edge(place: tuple[float, float], towards: tuple[float, float]) -> tuple[float, float]:
    """Where the line from a box's middle leaves it, and a little further."""
    dx, dy = towards[0] - place[0], towards[1] - place[1]
    share = min(
        (BOX_W / 2 + 4) / abs(dx) if dx else math.inf, (BOX_H / 2 + 4) / abs(dy) if dy else math.inf
    )
    return place[0] + dx * share, place[1] + dy * share


def _loop(place: tuple[float, float], labels: list[str]) -> str:
    x, y = place
    up = -1 if y < CENTRE_Y else 1
    if y > CENTRE_Y + RADIUS_Y:  # below all: its loop is on the right
        x += BOX_W / 2 + 4
        path = (
            f"M{x:.0f} {y - 8:.0f}C{x + 34:.0f} {y - 26:.0f} "
            f"{x + 34:.0f} {y + 26:.0f} {x:.0f} {y + 8:.0f}"
        )
        return f'<path d="{path}" marker-end="url(#states-tip)"/>' + _text(
            x + 32, y, labels, "start"
        )
    edge, far = y + up * (BOX_H / 2 + 4), y + up * (BOX_H / 2 + 38)
    path = (
        f"M{x - 12:.0f} {edge:.0f}C{x - 34:.0f} {far:.0f} "
        f"{x + 34:.0f} {far:.0f} {x + 12:.0f} {edge:.0f}"
    )
    return f'<path d="{path}" marker-end="url(#states-tip)"/>' + _text(
        x, far - up * 2 + (0 if up < 0 else 4), labels, "middle"
    )


def _text(x: float, y: float, labels: list[str], anchor: str) -> str:
    lines = ", ".join(labels)
    return (
        f'<text class="move" x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(lines)}</text>'
    )
