"""The names under which command types and jobs are known."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

from s2s.errors import OperatorError

K = TypeVar("K")

_NAME: Final = re.compile(r"[a-z][a-z0-9_.]{0,63}")


def by_name(
    kinds: Iterable[K], noun: str, attribute: str, check: Callable[[Any], object] = lambda _: None
) -> dict[str, K]:
    """Key things by their name.

    :param noun: what one is called.
    :param attribute: which one holds its name.
    :param check: raises :class:`OperatorError` where something else of it is wrong.
    :raises OperatorError: a name is ill-formed or stands twice; or what ``check`` says, with whose it is.
    """
    known: dict[str, K] = {}
    for kind in kinds:
        where = f"the {noun} {type(kind).__module__}.{type(kind).__qualname__}"
        name = getattr(kind, attribute)
        if not _NAME.fullmatch(name):
            raise OperatorError(f"{where} has the {attribute} {name!r}: write it as [a-z][a-z0-9_.]{{0,63}}")
        if name in known:
            raise OperatorError(f"{where} has the {attribute} {name!r} of another one: give it a name of its own")
        try:
            check(kind)
        except OperatorError as error:
            raise OperatorError(f"{where}: {error}") from None
        known[name] = kind
    return known
