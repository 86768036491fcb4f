"""The names of command types and jobs."""

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
    """Return a dict of objects by their names.

    :param noun: the noun for one object, for error messages.
    :param attribute: the attribute that holds the name.
    :param check: a further check of an object, which raises :class:`OperatorError`.
    :raises OperatorError: a name is ill-formed or occurs twice, or ``check`` raised it; the text names the object.
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
