"""Authentication and its rate limit: :mod:`s2s.admin.http.sign_in`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from twisted.internet.defer import Deferred, inlineCallbacks, succeed
from twisted.internet.task import Clock as FakeTime
from twisted.trial.unittest import SynchronousTestCase

from s2s.admin.http import sign_in
from s2s.admin.http.problems import Problem
from s2s.admin.http.sign_in import FAILURES, FORGIVE_S, POLL_S, Caller, SignIn
from s2s.errors import AuthBad, AuthRequired, DatabaseUnavailable, DbUnavailable
from s2s.protocol.limits import Counters
from s2s.runtime.clock import Clock
from s2s.store.access import digest, make
from s2s.store.tables.tokens import TokenRow
from tests.support.http import ApiTestCase, ask
from tests.support.waiting import poll


class _Database:
    """A pool that returns the rows of the test."""

    def __init__(self) -> None:
        self.rows: list[TokenRow] = []
        self.reads = 0
        self.is_away = False

    def run(self, *_: object) -> Deferred[list[TokenRow]]:
        """Return the rows."""
        self.reads += 1
        if self.is_away:
            failed: Deferred[list[TokenRow]] = Deferred()
            failed.errback(DatabaseUnavailable("away"))
            return failed
        return succeed(list(self.rows))


class SignInTests(SynchronousTestCase):
    """Without a network, a database or a real clock."""

    def setUp(self) -> None:
        """Create the sign-in with two tokens."""
        self.time = FakeTime()
        self.time.advance(1000)
        self.database = _Database()
        self.token, self.short = make("alice"), make("bob")
        self.database.rows = [
            TokenRow("alice", "admin", digest(self.token), None),
            TokenRow("bob", "observer", digest(self.short), 60.0),
        ]
        self.counters = Counters()
        database: Any = self.database
        self.sign_in = SignIn(database, Clock(self.time), self.counters)
        self.sign_in.start()
        self.addCleanup(self.sign_in.stop)

    def try_(self, authorization: str | None, address: str = "here") -> Any:
        """Sign in, and return the caller or the error."""
        trying = self.trying(authorization, address)
        self.time.advance(sign_in.UNKNOWN_GAP_S)
        return self.successResultOf(trying)

    def trying(self, authorization: str | None, address: str = "here") -> Deferred[Any]:
        """Start to sign in."""
        trying: Deferred[Any] = Deferred.fromCoroutine(self.sign_in.caller(authorization, address))
        return trying.addErrback(lambda failure: failure.value)

    def test_who(self) -> None:
        """A token determines actor and access; the scheme is case-insensitive."""
        for scheme in ("Bearer", "bearer", "BEARER"):
            caller = self.try_(f"{scheme} {self.token}")
            self.assertEqual((caller.actor, caller.access), ("token:alice", "admin"))
        self.assertEqual(self.database.reads, 1)

    def test_refused(self) -> None:
        """A missing token, another scheme and a wrong token are refused; the error does not reveal the wrong part."""
        self.assertIsInstance(self.try_(None), AuthRequired)
        wrong = [f"Basic {self.token}", "Bearer", "Bearer x", f"Bearer {make('alice')}", f"Bearer {make('nobody')}"]
        told = {(type(error), str(error)) for error in map(self.try_, wrong)}
        self.assertEqual(len(told), 1)
        self.assertIs(next(iter(told))[0], AuthBad)

    def test_expiry(self) -> None:
        """An expired token is refused from its expiry on, even if the table is not read again."""
        self.assertEqual(self.try_(f"Bearer {self.short}").actor, "token:bob")
        self.database.rows.pop()
        self.sign_in.stop()
        self.time.advance(58.9)  # one second has passed during the previous attempt
        self.assertEqual(self.try_(f"Bearer {self.short}").actor, "token:bob")
        self.time.advance(0.2)
        self.assertIsInstance(self.try_(f"Bearer {self.short}"), AuthBad)

    def test_new_and_gone(self) -> None:
        """A new token is accepted at once; a revoked one is refused after the NOTIFY or the next poll."""
        new = make("carol")
        self.database.rows.append(TokenRow("carol", "operator", digest(new), None))
        self.assertEqual(self.try_(f"Bearer {new}").access, "operator")
        self.database.rows.pop()
        self.assertEqual(self.try_(f"Bearer {new}").access, "operator")
        self.sign_in.notify()
        self.assertIsInstance(self.try_(f"Bearer {new}"), AuthBad)
        self.database.rows.clear()
        self.time.advance(POLL_S)
        self.assertIsInstance(self.try_(f"Bearer {self.token}"), AuthBad)

    def test_strangers_do_not_read(self) -> None:
        """Unknown tokens cause at most one read of the table a second; malformed ones cause none."""
        before = self.database.reads
        self.try_("Bearer x")
        self.assertEqual(self.database.reads, before)
        self.trying(f"Bearer {make('x')}")
        self.time.advance(0)
        new = make("carol")
        self.database.rows.append(TokenRow("carol", "operator", digest(new), None))
        trying = [self.trying(f"Bearer {make('x')}", f"there {at}") for at in range(5)]
        known = self.trying(f"Bearer {new}")
        self.time.advance(0.9)
        self.assertEqual(self.database.reads, before + 1)
        for each in (*trying, known):
            self.assertNoResult(each)
        self.time.advance(0.1)
        self.assertEqual(self.database.reads, before + 2)
        self.assertEqual({type(self.successResultOf(each)) for each in trying}, {AuthBad})
        self.assertEqual(self.successResultOf(known).actor, "token:carol")

    def test_the_database_is_away(self) -> None:
        """While the database is away known tokens are accepted, and unknown ones fail with ``DbUnavailable``."""
        self.database.is_away = True
        self.time.advance(POLL_S)
        self.assertEqual(self.try_(f"Bearer {self.token}").actor, "token:alice")
        self.assertIsInstance(self.try_(f"Bearer {make('new')}"), DbUnavailable)
        self.flushLoggedErrors()

    def test_the_database_hangs(self) -> None:
        """The look-up of an unknown token has a timeout, is not counted as a failure, and leaves no waiter."""
        self.time.advance(sign_in.UNKNOWN_GAP_S)
        self.database.run = lambda *_: Deferred()  # type: ignore[method-assign]
        trying = [self.trying(f"Bearer {make('new')}") for _ in range(FAILURES - 1)]
        self.time.advance(sign_in.READ_S - 0.1)
        for each in trying:
            self.assertNoResult(each)
        self.time.advance(0.1)
        self.assertEqual({type(self.successResultOf(each)) for each in trying}, {DbUnavailable})
        # The one waiter of the poll may be left.
        self.assertLessEqual(len(self.sign_in._refresher._waiters), 1)

    def test_the_limit(self) -> None:
        """After ``FAILURES`` failures an address has to wait; other addresses and valid tokens are accepted."""
        self.patch(sign_in, "UNKNOWN_GAP_S", 0.0)
        for _ in range(FAILURES):
            self.assertIsInstance(self.try_("Bearer x"), AuthBad)
        reads = self.database.reads
        for _ in range(3):
            refused = self.try_(f"Bearer {make('x')}")
            self.assertIsInstance(refused, Problem)
            self.assertEqual(
                (refused.status, refused.body["code"], refused.headers["Retry-After"]), (429, "overloaded", "1")
            )
        self.assertEqual(self.database.reads, reads)
        self.assertEqual(self.counters.met["sign_ins"], 3)
        self.assertIsInstance(self.try_("Bearer x", "there"), AuthBad)
        self.assertEqual(self.try_(f"Bearer {self.token}").actor, "token:alice")
        self.assertIsInstance(self.try_(None), AuthRequired)
        self.time.advance(FORGIVE_S)
        self.assertIsInstance(self.try_("Bearer x"), AuthBad)
        self.assertIsInstance(self.try_("Bearer x"), Problem)
        self.time.advance(FORGIVE_S * FAILURES)
        for _ in range(FAILURES):
            self.assertIsInstance(self.try_("Bearer x"), AuthBad)

    def test_the_limit_at_once(self) -> None:
        """The limit holds for concurrent attempts; valid tokens and failed look-ups do not count."""
        trying = [self.trying(f"Bearer {make('x')}") for _ in range(FAILURES + 9)]
        self.time.advance(sign_in.UNKNOWN_GAP_S)
        told = [type(self.successResultOf(each)) for each in trying]
        self.assertEqual(told, [AuthBad] * FAILURES + [Problem] * 9)

        self.time.advance(FORGIVE_S * FAILURES)
        new = make("carol")
        self.database.rows.append(TokenRow("carol", "operator", digest(new), None))
        for is_away, told in ((True, DbUnavailable), (False, Caller)):
            self.database.is_away = is_away
            for _ in range(2):
                trying = [self.trying(f"Bearer {new}") for _ in range(FAILURES)]
                self.time.advance(sign_in.UNKNOWN_GAP_S)
                self.assertEqual({type(self.successResultOf(each)) for each in trying}, {told})
        self.assertEqual({type(self.successResultOf(self.trying("Bearer x"))) for _ in range(FAILURES)}, {AuthBad})
        self.flushLoggedErrors()

    def test_its_memory(self) -> None:
        """The number of remembered addresses is limited; the oldest is forgotten."""
        self.patch(sign_in, "MOST_ADDRESSES", 3)
        for _ in range(FAILURES):
            self.try_("Bearer x", "a")
        for address in ("b", "c", "d"):
            self.try_("Bearer x", address)
        self.assertIsInstance(self.try_("Bearer x", "a"), AuthBad)


class RealTests(ApiTestCase):
    """Against a real server."""

    @inlineCallbacks
    def test_at_once(self) -> Iterator[Deferred[Any]]:
        """A token that is revoked, or changed in plain SQL, changes at once, on open connections too."""
        self.assertEqual(self.ask("GET", "/v1/config").status, 200)
        self.assertEqual(self.ask("PUT", "/v1/config/relay.window", {"value": 9}, role="operator").status, 403)
        self.execute("update s2s.api_tokens set role = 'admin' where role = 'operator'")
        yield poll(
            lambda: self.ask("PUT", "/v1/config/relay.window", {"value": 9}, role="operator").status == 200, "it may"
        )
        self.execute("delete from s2s.api_tokens where name = 'an-admin'")
        yield poll(lambda: self.ask("GET", "/v1/config").status == 401, "it is not let in")

    def test_only_health_is_open(self) -> None:
        """Without a token every path except /healthz and /readyz answers 401, whether it exists or not."""
        self.assertEqual(ask(self.api, "GET", "/healthz").body, {"status": "ok"})
        for path in (
            "/",
            "/openapi.json",
            "/v1/engines",
            "/v1/nothing",
            "/healthz/x",
        ):
            for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
                answer = ask(self.api, method, path)
                self.assertEqual((answer.status, answer.body["code"]), (401, "auth_required"), path)
                self.assertEqual(answer.headers["www-authenticate"], 'Bearer realm="s2s"')
        self.assertEqual(ask(self.api, "POST", "/healthz").status, 405)
        for path in ("/healthz/", "//healthz"):
            self.assertEqual(ask(self.api, "GET", path).status, 404, path)

    def test_the_limit(self) -> None:
        """Repeated wrong tokens get 429 with a time to wait; a valid token is not delayed."""
        statuses = [ask(self.api, "GET", "/v1/config", "guessed").status for _ in range(FAILURES + 20)]
        self.assertEqual(statuses[:FAILURES], [401] * FAILURES)
        self.assertGreater(statuses[FAILURES:].count(429), 10)
        refused = ask(self.api, "GET", "/v1/config", "x")
        self.assertEqual(
            (refused.body["code"], refused.headers["content-type"]), ("overloaded", "application/problem+json")
        )
        self.assertEqual(refused.headers["retry-after"], "1")
        self.assertEqual(self.ask("GET", "/v1/config").status, 200)
