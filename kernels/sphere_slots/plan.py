"""How the Triton form cuts a call: a pure function of the shape of a state."""

import math
from typing import NamedTuple


SEGMENT = 64
"""Tokens between the states that a backward pass keeps."""

LARGEST_STATE = 4096
"""Numbers of a padded state; with more of them the backward pass would spill registers."""


class Plan(NamedTuple):
    """Slots and width as powers of two, and the warps of a program: sixteen numbers of a state for each thread."""

    slots: int
    width: int
    warps: int


def plan(slots: int, width: int) -> Plan:
    """Cut a call."""
    sizes = [1 << (n - 1).bit_length() for n in (slots, width)]
    return Plan(*sizes, min(8, max(1, math.prod(sizes) // 512)))
