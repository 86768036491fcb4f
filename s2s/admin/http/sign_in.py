"""Who asks: the tokens of ``api_tokens`` in memory, and the limit on those that fail (docs/api.rst, "Tokens")."""

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

#: Beside the table's NOTIFY, which can be lost.
POLL_S: Final = 5.0
#: From the beginning of a read to one for a token that is not known, which anybody can make up.
UNKNOWN_GAP_S: Final = 1.0
#: Seconds that a token that is not known is looked for.
READ_S: Final = 5.0
#: Sign-ins of one address that may fail at once, and seconds until one more may.
FAILURES: Final = 50
FORGIVE_S: Final = 1.0
#: Addresses that are remembered: of more the oldest is forgotten.
MOST_ADDRESSES: Final = 10_000


@dataclass(frozen=True)
class Caller:
    """Whoever has signed in."""

    actor: str
    access: Access


class SignIn:
    """Knows the tokens. While the database is away, those read last stay in force."""

    def __init__(self, database: Database, clock: Clock, counters: Counters) -> None:
        self._clock = clock
        self._counters = counters
        self._failures = _Failures(clock)
        #: By name, with the moment of the monotonic clock at which each ends.
        self._tokens: dict[str, tuple[TokenRow, float | None]] = {}
        self._refresher = Refresher(database, clock, tokens.read, (), self._on_value, POLL_S)
        self.start, self.stop = self._refresher.start, self._refresher.stop
        self.notify = self._refresher.notify

    async def caller(self, authorization: str | None, address: str) -> Caller:
        """Tell who asks.

        A token that is right is let in at any time: nobody guesses one, and nobody may lock others out by trying.

        :param authorization: the header.
        :param address: where the request comes from.
        :raises AuthRequired: there is no token.
        :raises AuthBad: it is not known, has ended or was revoked: it is not told which.
        :raises Problem: too many have failed here.
        :raises DbUnavailable: it is not known, and the database cannot be asked.
        """
        if authorization is None:
            raise AuthRequired("sign in with the header Authorization: Bearer TOKEN, of s2s tokens add")
        token = _token(authorization)
        caller = self._find(token)
        if caller is None:
            if not self._failures.may_try(address):
                self._refuse_for_now(address)
            # Until it is known to be none: many at once would all find room.
            self._failures.add(address)
            # One that was just made is not known yet.
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
        """Return whether a header has a token that is in memory and valid now."""
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
    """How many sign-ins have failed, by address: a bucket that empties with time."""

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
