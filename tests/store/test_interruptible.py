"""A database that does not answer the main thread: :mod:`s2s.store.interruptible`."""

from __future__ import annotations

import os
import sys
import threading

import psycopg2
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import DatabaseUnavailable
from s2s.store import interruptible, pool
from s2s.store.pool import blocking
from tests.support.silent import SilentDatabase


class PatienceTests(SynchronousTestCase):
    """Connecting, and the first statements of a session."""

    def setUp(self) -> None:
        """Shorten the timeouts, and capture stderr."""
        self.patch(interruptible, "LATE_S", 0.1)
        self.patch(pool, "READY_S", 0.5)
        self.told = os.fdopen(os.memfd_create("stderr"), "w+")
        self.addCleanup(self.told.close)
        self.patch(sys, "__stderr__", self.told)

    def refused(self, url: str) -> str:
        """Return the lines on stderr before a transaction fails."""
        error = self.assertRaises(DatabaseUnavailable, blocking(url).__enter__)
        self.assertEqual(str(error), "no answer of the database at 127.0.0.1 within 0.5 s")
        self.told.seek(0)
        return self.told.read()

    def test_no_handshake(self) -> None:
        """A host that accepts a connection but never answers is logged once, without the password, then fails."""
        database = SilentDatabase(is_letting_in=False)
        self.addCleanup(database.close)
        told = self.refused(database.url)
        self.assertRegex(told, r"\Awaiting for the database at 127\.0\.0\.1: there is no connection yet: .*\n\Z")
        self.assertNotIn("hunter2", told)

    def test_no_first_answer(self) -> None:
        """A session without an answer to its first statement, as behind a full pooler, is logged once, then fails."""
        database = SilentDatabase(is_letting_in=True)
        self.addCleanup(database.close)
        told = self.refused(database.url)
        self.assertRegex(told, r"\Awaiting for the database at 127\.0\.0\.1: its session gets no answer: .*\n\Z")

    def test_a_name_server_that_does_not_answer(self) -> None:
        """A name lookup that does not return, and that libpq does not bound, is logged once, then fails."""
        hangs = threading.Event()
        self.addCleanup(hangs.set)
        self.patch(psycopg2, "connect", lambda **_: hangs.wait())
        told = self.refused("postgresql://u@127.0.0.1/d")
        self.assertIn("there is no connection yet: see its name server", told)


class PlaceTests(SynchronousTestCase):
    """The name of the database in the log line."""

    def test_places(self) -> None:
        """The database is named by its host, service or socket, without control characters."""
        for parameters, place in (
            ({"host": "db.example", "password": "hunter2"}, "db.example"),
            ({"hostaddr": "192.0.2.1"}, "192.0.2.1"),
            ({"service": "game"}, "service game"),
            ({"host": ""}, "its local socket"),
            ({"host": "a\x1b"}, r"'a\x1b'"),
        ):
            patience = interruptible.Patience(parameters, 0.0)
            with self.assertRaises(Exception) as caught:
                patience.spend("")
            self.assertEqual(str(caught.exception), f"no answer of the database at {place} within 0 s")
