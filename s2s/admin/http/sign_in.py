"""Authenticate requests by the tokens of ``api_tokens``, and limit failed sign-ins (docs/api.rst, "Tokens")."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from twisted.internet.defer import TimeoutError

from s2s.admin.http.problems import Problem
from s2s.errors import AuthBad, AuthRequired, DatabaseError, DbUnavailable, Overloaded
from s2s.protocol.limits import Counters
from s2s.runtime.clock import Clock
from s2s.store.access import Access, is_of, name_of
from s2s.store.pool import Database
from s2s.store.refresher import Refresher
from s2s.store.tables import tokens
from s2s.store.tables.tokens import TokenRow

#: Seconds between two reads of the table, in addition to its NOTIFY, which can be lost.
POLL_S: Final = 5.0
#: Minimum seconds between the start of a read and the next read for an unknown token, because anybody can make one up.
UNKNOWN_GAP_S: Final = 1.0
#: Seconds that a read for an unknown token may take.
READ_S: Final = 5.0
#: Failed sign-ins that one address may have at once, and seconds until one more is allowed.
FAILURES: Final = 50
FORGIVE_S: Final = 1.0
#: The number of addresses with failed sign-ins that are remembered; beyond that, the oldest is forgotten.
MOST_ADDRESSES: Final = 10_000


@dataclass(frozen=True)
class Caller:
    """The authenticated caller of a request."""

    actor: str
    access: Access


class SignIn:
    """Holds the tokens in memory. While the database is away, the last-read tokens stay valid."""

    def __init__(self, database: Database, clock: Clock, counters: Counters) -> None:
        self._clock = clock
        self._counters = counters
        self._failures = _Failures(clock)
        #: The tokens by name, each with the time of the monotonic clock at which it expires.
        self._tokens: dict[str, tuple[TokenRow, float | None]] = {}
        self._refresher = Refresher(database, clock, tokens.read, (), self._on_value, POLL_S)
        self.start, self.stop = self._refresher.start, self._refresher.stop
        self.notify = self._refresher.notify

    async def caller(self, authorization: str | None, address: str) -> Caller:
        """Return the caller of a request.

        A valid token is always accepted, also from an address with too many failures: tokens cannot be guessed, and a
        client must not be able to lock out others by failed sign-ins.

        :param authorization: the value of the header.
        :param address: the address of the client.
        :raises AuthRequired: there is no token.
        :raises AuthBad: the token is unknown, expired or revoked; the error does not tell which.
        :raises Problem: too many sign-ins from this address have failed.
        :raises DbUnavailable: the token is unknown, and the database cannot be read.
        """
        if authorization is None:
            raise AuthRequired("sign in with the header Authorization: Bearer TOKEN, of s2s tokens add")
        token = _token(authorization)
        caller = self._find(token)
        if caller is None:
            if not self._failures.may_try(address):
                self._refuse_for_now(address)
            # Count a failure before the token is checked, or many concurrent requests would all pass the limit.
            self._failures.add(address)
            # A token that was just created is not in memory yet.
            if name_of(token) is not None:
                reading = self._refresher.read_now(UNKNOWN_GAP_S)
                try:
                    await reading.addTimeout(READ_S, self._clock.scheduler)
                except (DatabaseError, TimeoutError):
                    self._failures.take_back(address)
                    raise DbUnavailable(retry_after_ms=1000) from None
                caller = self._find(token)
            if caller is not None:
                self._failures.take_back(address)
        if caller is None:
            raise AuthBad("the token is not valid: it was never made, has expired, or was revoked")
        return caller

    def knows(self, authorization: str) -> bool:
        """Return whether the header has a token that is in memory and valid now."""
        return self._find(_token(authorization)) is not None

    def _refuse_for_now(self, address: str) -> None:
        self._counters.meet("sign_ins")
        wait_ms = round(1000 * self._failures.wait_s(address))
        raise Problem(Overloaded("too many sign-ins have failed from this address", retry_after_ms=wait_ms), 429)

    def _find(self, token: str) -> Caller | None:
        name = name_of(token)
        row, ends_at = self._tokens.get(name or "", (None, 0.0))
        is_right = is_of(token, None if row is None else row.token_sha256)
        if row is None or not is_right or (ends_at is not None and ends_at <= self._clock.mono()):
            return None
        return Caller(f"token:{row.name}", row.role)

    def _on_value(self, rows: Sequence[TokenRow]) -> None:
        now = self._clock.mono()
        self._tokens = {row.name: (row, None if row.left_s is None else now + row.left_s) for row in rows}


def _token(authorization: str) -> str:
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


class _Failures:
    """The number of failed sign-ins by address, as a leaky bucket."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._full: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def may_try(self, address: str) -> bool:
        return self._level(address) <= FAILURES - 1

    def wait_s(self, address: str) -> float:
        return max(0.0, self._level(address) - (FAILURES - 1)) * FORGIVE_S

    def add(self, address: str) -> None:
        level = self._level(address)
        self._full[address] = (min(level + 1, FAILURES), self._clock.mono())
        self._full.move_to_end(address)
        if len(self._full) > MOST_ADDRESSES:
            self._full.popitem(last=False)

    def take_back(self, address: str) -> None:
        if address in self._full:
            level, at = self._full[address]
            self._full[address] = (level - 1, at)

    def _level(self, address: str) -> float:
        level, at = self._full.get(address, (0.0, 0.0))
        return max(0.0, level - (self._clock.mono() - at) / FORGIVE_S)
