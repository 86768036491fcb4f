"""The estimated cost of a pattern, from its text: the steps that it may take on the strings of one payload.

The regex engine of ``jsonschema-rs`` never backtracks. It builds the states of an automaton while it reads the text. A
pattern that can be in few positions at once needs few states. A pattern that can be in many positions at once, such as
``a[ab]{30}``, may need a new state for every byte, and the cost of a state is proportional to its number of positions.
"""

from __future__ import annotations

import re
import sys
from typing import Final

#: Steps per byte of a text whose states are already built.
_PER_BYTE: Final = 2
#: Steps per position to build a state; 32 ns at most were measured.
_PER_POSITION: Final = 3
#: Bytes that may each need work to build one state.
_PER_STATE: Final = 4
#: Steps per string before its first byte is read.
_PER_STRING: Final = 10

_TOKEN: Final = re.compile(
    r"(?P<open>\((?:\?(?:P?<[^>]*>|[A-Za-z-]*:?))?)|(?P<close>\))|(?P<either>\|)|(?P<many>[*+])|(?P<maybe>\?)|(?P<edge>[\^$])"
    r"|\{(?P<least>\d+)(?P<comma>,?)(?P<most>\d*)\}|\\.|\[(?:\\.|[^]\\])*\]|.",
    re.DOTALL,
)
_TIED: Final = re.compile(r"\^(?![*+?{])")


def steps(pattern: str, strings: int, size: int) -> int:
    """Return the steps for the most expensive strings.

    :param strings: the number of strings.
    :param size: their total length in bytes.
    """
    positions, sure, passing = _positions(pattern)
    return (
        strings * _PER_STRING
        + size * _PER_BYTE
        + _states(positions - passing, size)
        + _states(max(0, passing - sure), min(size, strings * positions))
    )


def _states(at_once: int, size: int) -> int:
    """Return the steps to build states: at most one state for each set of positions and at most one for each byte."""
    return min(size, _PER_STATE << min(at_once, 20)) * at_once * _PER_POSITION


def _positions(pattern: str) -> tuple[int, int, int]:
    """Count the positions of a pattern, one for each character after the repeats ``{n,m}`` are expanded.

    :returns: the number of positions; the number of leading positions of which only one is active at a time, because
        each has a fixed place in the text; and the number of leading positions to which no loop leads back, so that the
        text passes each of them once.
    """
    #: The number of positions in each open group.
    groups = [0]
    #: The number of positions in the previous item, which a quantifier repeats.
    last = 0
    sure = passing = sys.maxsize if _TIED.match(pattern) else 0
    for token in _TOKEN.finditer(pattern):
        if token["open"]:
            groups.append(0)
        elif token["close"]:
            if len(groups) > 1:
                last = groups.pop()
                groups[-1] += last
        elif token["either"]:
            sure = min(sure, sum(groups[:-1]))
            passing = 0 if len(groups) == 1 else passing
        elif token["many"] or token["maybe"] or token["least"]:
            before = sum(groups) - last
            times = max(1, int(token["most"] or token["least"] or 1))
            if token["many"] or (token["comma"] and not token["most"]):
                sure, passing = min(sure, before), min(passing, before)
            elif token["maybe"] or token["comma"]:
                # Repeats of one character are active one at a time; the items after them have no fixed place.
                sure = min(sure, before + times if last == 1 else before)
            groups[-1] += last * (times - 1)
            last *= times
        elif not token["edge"]:
            last = 1
            groups[-1] += 1
    positions = sum(groups)
    return positions, min(sure, positions), min(passing, positions)
