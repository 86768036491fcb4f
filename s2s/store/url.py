"""Read the database's address: a URL, a libpq connection string, or ``@FILE`` for a file that contains one."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Final

import psycopg2
from psycopg2.extensions import parse_dsn

from s2s.errors import OperatorError
from s2s.runtime import files

_UNREADABLE: Final = (
    "the database URL cannot be read: write postgresql://USER:PASSWORD@HOST:PORT/DATABASE, "
    "with %40, %2F and %3F for @, / and ? inside a name or password"
)
_UNKNOWN: Final = re.compile(r'invalid (?:URI query parameter|connection option):? "([a-z_]{1,40})"')


def locate(given: str, source: str) -> str:
    """Check the database address that an operator has given.

    :param given: a URL, or ``@FILE``, because every user of the machine can read argv.
    :param source: the option or variable, for the error message.
    :returns: a URL, or ``@`` and an absolute path if the file can be read again for every connection.
    :raises OperatorError: the address cannot be read.
    """
    given = given.strip()
    if not given:
        raise OperatorError(f"{source} is empty: give it a database URL or @FILE, or leave it out")
    if given.startswith("@"):
        given = f"@{os.path.abspath(given[1:])}" if len(given) > 1 else given
        text = _content(given)
        # A pipe cannot be read again, so use its content.
        given = given if os.path.isfile(given[1:]) else text
    read(given)
    return given


def read(url: str) -> dict[str, str]:
    """Return the connection parameters of a URL; the file of an ``@FILE`` is read each time.

    :raises OperatorError: with one line that quotes no part of a password, which libpq's own message may do.
    """
    text = _content(url) if url.startswith("@") else url.strip()
    if text[:1] in ("'", '"'):
        raise OperatorError("the database URL stands in quotes, which are a part of it: leave them out")
    is_uri = re.match(r"postgres(?:ql)?://", text) is not None
    if is_uri and len(text.splitlines()) > 1:
        place = f" in the file {url[1:]}" if url.startswith("@") else ""
        raise OperatorError(f"the database URL{place} has more than one line: write one URL alone")
    is_cut = is_uri and _is_cut(text.partition("://")[2])
    try:
        given = parse_dsn(text)
    except psycopg2.Error as error:
        unknown = _UNKNOWN.search(str(error))
        # After an "@", the name may be a part of a password.
        if unknown is None or is_cut or (is_uri and "@" in text.partition("?")[2]):
            raise OperatorError(_UNREADABLE) from None
        raise OperatorError(
            f"the database URL has a parameter that PostgreSQL's client does not know, {unknown[1]!r}: correct it, "
            "or leave it out"
        ) from None
    if is_cut or not re.fullmatch(r"[\d,]*", given.get("port", "")):
        raise OperatorError(_UNREADABLE)
    return dict(given)


def _is_cut(rest: str) -> bool:
    """Whether an unescaped character in a name or password ends it too early.

    :param rest: the URL after its ``://``.
    """
    user, at, behind = rest.partition("@")
    if not at:
        return False
    if "/" in user:  # libpq looks for no user after a slash
        return "@" in rest.partition("?")[0]
    is_query = "?" in user.partition(":")[0] or re.search(r"\?\w+=", user)
    return bool(is_query) or "@" in behind.partition("?")[0]


def _content(given: str) -> str:
    """Return the content of the file of an ``@FILE``."""
    path = Path(given[1:])
    try:
        if path.is_dir() or stat.S_ISBLK(path.stat().st_mode):
            raise OperatorError(f"the file of the database URL is no file: {path}: name one behind the @")
    except (OSError, ValueError):
        pass  # the read tells the reason
    text = files.read_text(path, "the file of the database URL")
    if not text:
        raise OperatorError(f"the file of the database URL is empty: {path}: write one URL into it")
    if text.startswith("@"):
        raise OperatorError(f"the file of the database URL names another file: {path}: write one URL into it")
    return text
