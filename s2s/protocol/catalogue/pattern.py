"""The cost of a pattern, judged by its text: the steps that it may take on the strings of one payload.

The engine of ``jsonschema-rs`` never backtracks. It makes the states of an automaton while it reads. A pattern that can
be in few positions at once needs few states. One that can be in many positions at once, such as ``a[ab]{30}``, may need
a new state for every byte, and each costs as much as its positions.
"""

from __future__ import annotations

import re
import sys
from typing import Final

#: Steps per byte of a text, where the states are there.
_PER_BYTE: Final = 2
#: Steps per position to make a state: 32 ns at most were measured.
_PER_POSITION: Final = 3
#: Bytes that may each need to make something of a state.
_PER_STATE: Final = 4
#: Steps to begin with a string.
_PER_STRING: Final = 10

_TOKEN: Final = re.compile(
    r"(?P<open>\((?:\?(?:P?<[^>]*>|[A-Za-z-]*:?))?)|(?P<close>\))|(?P<either>\|)|(?P<many>[*+])|(?P<maybe>\?)|(?P<edge>[\^$])"
    r"|\{(?P<least>\d+)(?P<comma>,?)(?P<most>\d*)\}|\\.|\[(?:\\.|[^]\\])*\]|.",
    re.DOTALL,
)
_TIED: Final = re.compile(r"\^(?![*+?{])")


def steps(pattern: str, strings: int, size: int) -> int:
    """Return the steps for the worst strings.

    :param strings: how many there are.
    :param size: their bytes in all.
    """
    positions, sure, passing = _positions(pattern)
    return (
        strings * _PER_STRING
        + size * _PER_BYTE
        + _states(positions - passing, size)
        + _states(max(0, passing - sure), min(size, strings * positions))
    )


def _states(at_once: int, size: int) -> int:
    """Return the steps to make the states for some bytes: one for each set of positions, and for each byte at most."""
    return min(size, _PER_STATE << min(at_once, 20)) * at_once * _PER_POSITION


def _positions(pattern: str) -> tuple[int, int, int]:
    """Count the characters of a pattern, with what ``{n,m}`` repeats written out.

    :returns: how many there are; how many at its start are met one at a time, since each has one place in the text; and
        how many at its start no loop leads back to: the text passes each of them once.
    """
    #: The positions in each group that is open.
    groups = [0]
    #: The positions of the item before, which a quantifier repeats.
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
                # Repeats of one character are met one at a time; what follows them has no certain place.
                sure = min(sure, before + times if last == 1 else before)
            groups[-1] += last * (times - 1)
            last *= times
        elif not token["edge"]:
            last = 1
            groups[-1] += 1
    positions = sum(groups)
    return positions, min(sure, positions), min(passing, positions)
