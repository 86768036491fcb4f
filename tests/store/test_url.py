"""How a database URL is read, refused and reread."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from twisted.internet.defer import inlineCallbacks
from twisted.logger import LogEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from s2s.errors import OperatorError
from s2s.roles import preflight
from s2s.runtime import files
from s2s.store import url
from s2s.store.driver import Query, parameters
from s2s.store.listen import Listener
from s2s.store.pool import Database, blocking
from tests.support.postgres import DatabaseTestCase
from tests.support.waiting import poll

_SECRET = "Tr0ub4dor"


class ReadingTests(SynchronousTestCase):
    """:func:`s2s.store.url.read`."""

    def refused(self, text: str) -> str:
        """Check that a URL is refused in one line without the password, and return the line."""
        line = str(self.assertRaises(OperatorError, url.read, text))
        self.assertNotIn(_SECRET, line)
        self.assertNotIn("\n", line)
        return line

    def test_an_at_in_a_parameter(self) -> None:
        """An @ in a parameter, in a keyword string or in an escaped name is accepted, as libpq accepts it."""
        for text, name, value in (
            ("postgresql://u:p@h/d?application_name=me@here", "application_name", "me@here"),
            ("postgresql://h/d?user=me@example.com&password=a@b", "user", "me@example.com"),
            ("postgresql:///d?host=@abstract&user=a", "host", "@abstract"),
            ("postgresql://u@h/a%40b", "dbname", "a@b"),
            ("host=h dbname=a@b password=c@d", "password", "c@d"),
            ("postgresql://u:p?q@h/d", "password", "p?q"),
        ):
            with self.subTest(text=text):
                self.assertEqual(url.read(text)[name], value)

    def test_a_service(self) -> None:
        """A libpq service may set the password and the options; without one, PGOPTIONS of the process applies."""
        self.assertNotIn("password", parameters("service=prod dbname=game"))
        self.assertEqual(parameters("dbname=game")["options"], os.environ.get("PGOPTIONS", ""))
        self.assertEqual(parameters("dbname=game password=x")["password"], "x")

    def test_space_around(self) -> None:
        """White space around the URL, such as the newline at the end of a secret's file, is ignored."""
        self.assertEqual(url.read(" postgresql://u@h/d\r\n")["dbname"], "d")

    def test_an_unknown_parameter_is_named(self) -> None:
        """The error names a parameter that libpq does not know, in both notations."""
        for text in (f"postgresql://u:{_SECRET}@h/d?sslmoed=require", f"host=h password={_SECRET} sslmoed=require"):
            self.assertIn("'sslmoed'", self.refused(text))

    def test_a_part_of_a_password_is_not_named(self) -> None:
        """The error for unescaped characters in a password shows how to escape them and no part of the password."""
        for text in (
            f"postgresql://u:12/x?{_SECRET.lower()}=1@h/d",
            f"postgresql://u:12/{_SECRET}@h/d",
            f"postgresql://u:{_SECRET}@{_SECRET}@h/d",
            f"postgresql://u:{_SECRET}/x@h/d",
            f"postgresql://h:5432?password={_SECRET}@x",
            f"postgresql://h?password={_SECRET}@x",
            f"postgresql://u:%zz{_SECRET}@h/d",
            f"mysql://u:{_SECRET}@h/d",
        ):
            with self.subTest(text=text):
                line = self.refused(text)
                self.assertIn("%40", line)
                self.assertNotIn(_SECRET.lower(), line)


class QuoteTests(SynchronousTestCase):
    """Quotes that a file of environment variables keeps around a URL."""

    def test_they_are_named(self) -> None:
        """A URL in quotes is refused with the quotes as the reason, and no part of the URL is shown."""
        for quote in ("'", '"'):
            refused = str(self.assertRaises(OperatorError, url.read, f"{quote}postgresql://u:hunter2@h/d{quote}"))
            self.assertIn("stands in quotes", refused)
            self.assertNotIn("hunter2", refused)


class LocatingTests(SynchronousTestCase):
    """The values with which an operator names the database."""

    def refused(self, given: str | None) -> str:
        """Check that a value is refused in one line and no embedded database is made, and return the line."""
        directory = Path(self.mktemp())
        line = str(self.assertRaises(OperatorError, preflight.find_database, given, directory))
        self.assertNotIn("\n", line)
        self.assertFalse(directory.exists())
        return line

    def test_empty(self) -> None:
        """An empty or blank option or variable is an error, and does not select an embedded database."""
        for blank in ("", " \n"):
            self.assertIn("--database is empty", self.refused(blank))
            self.patch(os, "environ", {**os.environ, preflight.DATABASE_VARIABLE: blank})
            self.assertIn(f"{preflight.DATABASE_VARIABLE} is empty", self.refused(None))

    def test_files(self) -> None:
        """A missing, empty, too long, binary or unsuitable file, or one with a bad URL, is named in one line."""
        path = Path(self.mktemp())
        at = f"@{path}"
        self.assertIn(f"{path}: No such file", self.refused(at))
        for content, why in (
            (b" \n", "is empty"),
            (b"x" * 70_000, "is too long"),
            (b"\xff", "not UTF-8"),
            ("postgresql://u@h/d".encode("utf-16-le"), "is binary"),
            (b"postgresql://u@h/d\nsecond\n", f"in the file {path.absolute()} has more than one line"),
            (b"@other", "names another file"),
            (b"nonsense", "cannot be read"),
        ):
            path.write_bytes(content)
            self.assertIn(why, self.refused(at))
        for nothing in ("@", f"@{path.parent.absolute()}"):
            self.assertIn("name one behind the @", self.refused(nothing))
        self.assertIn("is too long", self.refused("@/dev/zero"))

    def test_files_of_windows(self) -> None:
        """A file that an editor on Windows has written, with a byte order mark or in UTF-16, is read."""
        path = Path(self.mktemp())
        for content in (b"\xef\xbb\xbfpostgresql://u@h/d\r\n", "postgresql://u@h/d\r\n".encode("utf-16")):
            path.write_bytes(content)
            self.assertEqual(url.read(f"@{path}")["dbname"], "d")

    def test_more_than_one_line(self) -> None:
        """A URL of two lines is refused without a quote of it; a connection string may have many."""
        self.assertIn("the database URL has more than one line", self.refused("postgresql://u:hunter2@h/d\nmore"))
        self.assertEqual(url.read("host=h\r\ndbname=d"), {"host": "h", "dbname": "d"})

    def test_a_pipe_is_read_once(self) -> None:
        """A URL that was read from a pipe is kept, since a pipe can be read only once."""
        read, write = os.pipe()
        self.addCleanup(os.close, read)
        os.write(write, b"postgresql://u@h/d\n")
        os.close(write)
        place = preflight.find_database(f"@/dev/fd/{read}", Path())
        self.assertEqual(place.url, "postgresql://u@h/d")

    def test_a_pipe_in_parts(self) -> None:
        """The writer of a named pipe may open it late, and may pause."""
        path = Path(self.mktemp())
        os.mkfifo(path)
        script = ["/bin/sh", "-c", '{ sleep 0.2; printf postgresql:; sleep 0.2; printf //u@h/d; } > "$0"', str(path)]
        with subprocess.Popen(script):
            self.assertEqual(preflight.find_database(f"@{path}", Path()).url, "postgresql://u@h/d")

    def test_a_pipe_that_nobody_writes_to(self) -> None:
        """A pipe without input is refused after a timeout, with a writer and without one."""
        self.patch(files, "SILENT_S", 0.1)
        path = Path(self.mktemp())
        os.mkfifo(path)
        self.assertIn(f"{path}: nothing came through it within 0.1 s", self.refused(f"@{path}"))
        read, write = os.pipe()
        self.addCleanup(os.close, read)
        self.addCleanup(os.close, write)
        self.assertIn("nothing came through it", self.refused(f"@/dev/fd/{read}"))

    def test_a_relative_file(self) -> None:
        """The path of a file is stored as an absolute path, because a daemon changes its directory."""
        path = Path(self.mktemp())
        path.write_text("postgresql://u@h/d")
        self.assertEqual(preflight.find_database(f"@{path}", Path()).url, f"@{path.absolute()}")


class RefresherTests(DatabaseTestCase):
    """A file whose URL changes while a role runs, such as after a password rotation."""

    def setUp(self) -> None:
        """Make a database user, and a file whose URL does not name that user yet."""
        super().setUp()
        self.execute("drop role if exists rotated")
        self.execute("create role rotated login superuser")
        self.addCleanup(self.execute, "drop role rotated")
        self.file = Path(self.mktemp())
        self.file.write_text(self.url)
        self.at = f"@{self.file.absolute()}"
        self.lines: list[str] = []
        globalLogPublisher.addObserver(self.hear)
        self.addCleanup(globalLogPublisher.removeObserver, self.hear)

    def hear(self, event: LogEvent) -> None:
        """Keep the complaints about the file."""
        if "complaint" in event:
            self.lines.append(event["complaint"])

    def rotate(self) -> None:
        """Write a URL with the new user to the file, and end all connections."""
        self.file.write_text(self.url.replace("postgres@", "rotated@"))
        self.hang_up()

    def hang_up(self) -> None:
        """End all connections except the one of the test."""
        self.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )

    @inlineCallbacks
    def test_pool(self) -> Any:
        """The pool's next connection, with a thread or without, uses the current content of the file."""
        database = Database(self.at, threads=1)
        database.start()
        self.addCleanup(database.stop)
        who = "select current_user"

        def ask(txn: Any) -> str:
            txn.execute(who)
            return str(txn.fetchone()[0])

        def steps() -> Any:
            return (yield Query(who, ()))

        first = yield database.run(ask)
        yield database.run_steps(steps)
        self.rotate()
        second = yield database.run(ask)
        [(third,)] = yield database.run_steps(steps)
        self.assertEqual((first, second, third), ("postgres", "rotated", "rotated"))

    @inlineCallbacks
    def test_broken_file(self) -> Any:
        """If the file becomes invalid, the previous URL stays in use, and one line is logged."""
        database = Database(self.at, threads=1)
        database.start()
        self.addCleanup(database.stop)
        self.file.write_text("")
        for _ in range(2):
            self.hang_up()
            yield database.run(lambda txn: txn.execute("select"))
        self.assertEqual(len(self.lines), 1)
        self.assertIn(str(self.file), self.lines[0])

    @inlineCallbacks
    def test_listener(self) -> Any:
        """The LISTEN connection also reconnects with the current content of the file."""
        listener = Listener(self.at, {"x": lambda: None}, application_name="ears")
        listener.start()
        self.addCleanup(listener.stop)

        def is_heard_by(name: str) -> bool:
            who = "select usename from pg_stat_activity where application_name = 'ears'"
            return self.execute(who) == [(name,)]

        yield poll(lambda: is_heard_by("postgres"), "it listens")
        self.rotate()
        yield poll(lambda: is_heard_by("rotated"), "it listens as the new role")

    def test_blocking(self) -> None:
        """A command of the command line reads the file as well."""
        with blocking(self.at) as txn:
            txn.execute("select 1")
        self.assertRaises(OperatorError, blocking("@/no/such").__enter__)
