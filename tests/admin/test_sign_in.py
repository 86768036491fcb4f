"""Who may come in, and how often one may try: :mod:`s2s.admin.http.sign_in`."""

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
    """A pool that gives the rows of a test."""

    def __init__(self) -> None:
        self.rows: list[TokenRow] = []
        self.reads = 0
        self.is_away = False

    def run(self, *_: object) -> Deferred[list[TokenRow]]:
        """Read."""
        self.reads += 1
        if self.is_away:
            failed: Deferred[list[TokenRow]] = Deferred()
            failed.errback(DatabaseUnavailable("away"))
            return failed
        return succeed(list(self.rows))


class SignInTests(SynchronousTestCase):
    """Without a network, a database or a clock."""

    def setUp(self) -> None:
        """Make one with two tokens."""
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
        """Sign in: who it is, or why not."""
        trying = self.trying(authorization, address)
        self.time.advance(sign_in.UNKNOWN_GAP_S)
        return self.successResultOf(trying)

    def trying(self, authorization: str | None, address: str = "here") -> Deferred[Any]:
        """Begin to sign in."""
        trying: Deferred[Any] = Deferred.fromCoroutine(self.sign_in.caller(authorization, address))
        return trying.addErrback(lambda failure: failure.value)

    def test_who(self) -> None:
        """A token says who comes, and what is allowed; the scheme's case does not matter."""
        for scheme in ("Bearer", "bearer", "BEARER"):
            caller = self.try_(f"{scheme} {self.token}")
            self.assertEqual((caller.actor, caller.access), ("token:alice", "admin"))
        self.assertEqual(self.database.reads, 1)

    def test_refused(self) -> None:
        """No token, another scheme, and a token that is wrong in any part are refused, and it is not said in which."""
        self.assertIsInstance(self.try_(None), AuthRequired)
        wrong = [f"Basic {self.token}", "Bearer", "Bearer x", f"Bearer {make('alice')}", f"Bearer {make('nobody')}"]
        told = {(type(error), str(error)) for error in map(self.try_, wrong)}
        self.assertEqual(len(told), 1)
        self.assertIs(next(iter(told))[0], AuthBad)

    def test_expiry(self) -> None:
        """A token that ends is refused from then on, read again or not."""
        self.assertEqual(self.try_(f"Bearer {self.short}").actor, "token:bob")
        self.database.rows.pop()
        self.sign_in.stop()
        self.time.advance(58.9)  # and the second that the try before took
        self.assertEqual(self.try_(f"Bearer {self.short}").actor, "token:bob")
        self.time.advance(0.2)
        self.assertIsInstance(self.try_(f"Bearer {self.short}"), AuthBad)

    def test_new_and_gone(self) -> None:
        """A token that was just made is known at once; one that was revoked is not, after the NOTIFY or a poll."""
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
        """Tokens that are not known let the table be read once a second for all of them, and what is no token not."""
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
        """While it is away those that are known come in, and of the others it is said that they cannot be asked for."""
        self.database.is_away = True
        self.time.advance(POLL_S)
        self.assertEqual(self.try_(f"Bearer {self.token}").actor, "token:alice")
        self.assertIsInstance(self.try_(f"Bearer {make('new')}"), DbUnavailable)
        self.flushLoggedErrors()

    def test_the_database_hangs(self) -> None:
        """A token that is not known is not looked for for ever, nor counted as wrong, and nothing is kept of it."""
        self.time.advance(sign_in.UNKNOWN_GAP_S)
        self.database.run = lambda *_: Deferred()  # type: ignore[method-assign]
        trying = [self.trying(f"Bearer {make('new')}") for _ in range(FAILURES - 1)]
        self.time.advance(sign_in.READ_S - 0.1)
        for each in trying:
            self.assertNoResult(each)
        self.time.advance(0.1)
        self.assertEqual({type(self.successResultOf(each)) for each in trying}, {DbUnavailable})
        # The poll's own.
        self.assertLessEqual(len(self.sign_in._refresher._waiters), 1)

    def test_the_limit(self) -> None:
        """After so many failures an address has to wait, others have not, and a token that is right comes in."""
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
        """Who tries many at once has no more of them; what turns out to be right, or cannot be judged, is none."""
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
        """Only so many addresses are remembered; the oldest is forgotten."""
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
        """A token that is revoked, or changed by plain SQL, is so at once, on a connection that stands too."""
        self.assertEqual(self.ask("GET", "/v1/config").status, 200)
        self.assertEqual(self.ask("PUT", "/v1/config/relay.window", {"value": 9}, role="operator").status, 403)
        self.execute("update s2s.api_tokens set role = 'admin' where role = 'operator'")
        yield poll(
            lambda: self.ask("PUT", "/v1/config/relay.window", {"value": 9}, role="operator").status == 200, "it may"
        )
        self.execute("delete from s2s.api_tokens where name = 'an-admin'")
        yield poll(lambda: self.ask("GET", "/v1/config").status == 401, "it is not let in")

    def test_only_health_is_open(self) -> None:
        """Without a token nothing but /healthz and /readyz answers, whether it is there or not."""
        self.assertEqual(ask(self.api, "GET", "/healthz").body, {"status": "ok"})
        for path in (
            "/",
            "/openapi.json",
            "/v1/engines",
            "/v1/nothing",
            "/healthz/",
            "/healthz/x",
            "//healthz",
        ):
            for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
                answer = ask(self.api, method, path)
                self.assertEqual((answer.status, answer.body["code"]), (401, "auth_required"), path)
                self.assertEqual(answer.headers["www-authenticate"], 'Bearer realm="s2s"')
        self.assertEqual(ask(self.api, "POST", "/healthz").status, 405)

    def test_the_limit(self) -> None:
        """Guessing is answered with 429 and a time to wait; who has a token is not held up by it."""
        statuses = [ask(self.api, "GET", "/v1/config", "guessed").status for _ in range(FAILURES + 20)]
        self.assertEqual(statuses[:FAILURES], [401] * FAILURES)
        self.assertGreater(statuses[FAILURES:].count(429), 10)
        refused = ask(self.api, "GET", "/v1/config", "x")
        self.assertEqual(
            (refused.body["code"], refused.headers["content-type"]), ("overloaded", "application/problem+json")
        )
        self.assertEqual(refused.headers["retry-after"], "1")
        self.assertEqual(self.ask("GET", "/v1/config").status, 200)
