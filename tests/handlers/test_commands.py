"""The declaration of a command handler, and the built-in one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any

from twisted.plugin import IPlugin
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from s2s.errors import BadPayload, OperatorError
from s2s.handlers import commands
from s2s.handlers.commands import BUILTIN, BatchCommandHandler, Command, CommandHandler, ICommandHandler, registry
from s2s.protocol.catalogue.schema import Schema
from s2s.store.driver import Cursor

_NOTICE = {"scope": "global", "message": "m", "severity": "info"}


class _Single(CommandHandler):
    cmd_type = "test.single"
    schema = {"type": "object"}

    def __init__(self) -> None:
        self.ran: list[Any] = []

    def run(self, txn: Cursor, command: Command) -> None:
        self.ran.append(command)


class _Batched(BatchCommandHandler):
    cmd_type = "test.batched"
    schema = {"type": "object"}

    def __init__(self) -> None:
        self.ran: list[Any] = []

    def run_batch(self, txn: Cursor, commands: Sequence[Command]) -> None:
        self.ran.append(list(commands))


class CommandTypeTests(SynchronousTestCase):
    """The two base classes."""

    def test_they_provide_the_interfaces(self) -> None:
        """Instances of the base classes provide the interfaces of a plug-in and of a command handler."""
        for kind in (_Single(), _Batched(), *BUILTIN):
            verifyObject(ICommandHandler, kind)
            verifyObject(IPlugin, kind)

    def test_each_can_do_the_others_work(self) -> None:
        """A handler written for single commands runs a batch, and one written for batches runs a single command."""
        commands = [Command(n, "t", f"k{n}", {}, 0, 100) for n in range(2)]
        single, batched = _Single(), _Batched()
        single.run_batch(None, commands)
        self.assertEqual(single.ran, commands)
        batched.run(None, commands[0])
        self.assertEqual(batched.ran, [commands[:1]])
        self.assertEqual((single.batched, batched.batched), (False, True))


class RegistryTests(SynchronousTestCase):
    """:func:`registry` and :data:`BUILTIN`."""

    def test_by_name(self) -> None:
        """Command handlers are found by their type name."""
        single = _Single()
        self.assertEqual(registry([single, *BUILTIN])["test.single"], single)

    def test_a_name_twice(self) -> None:
        """Two handlers of one type name are refused in one line that names the class."""
        self.assertIn("_Single", str(self.assertRaises(OperatorError, registry, [_Single(), _Single()])))

    def test_a_bad_name(self) -> None:
        """A name that no push can carry is refused."""
        kind = _Single()
        for name in ("", "Upper", "9a", "a" * 65, "a\n"):
            kind.cmd_type = name
            self.assertRaises(OperatorError, registry, [kind])

    def test_every_module_is_listed(self) -> None:
        """Every command module of the package has its handler in BUILTIN."""
        listed = {type(kind).__module__ for kind in BUILTIN}
        for module in pkgutil.iter_modules(commands.__path__, "s2s.handlers.commands."):
            defined = vars(importlib.import_module(module.name)).values()
            kinds = [one for one in defined if isinstance(one, type) and issubclass(one, CommandHandler)]
            if any(kind.__module__ == module.name and hasattr(kind, "cmd_type") for kind in kinds):
                self.assertIn(module.name, listed)


class NoticeSchemaTests(SynchronousTestCase):
    """The payload of ``notice.publish``."""

    schema = Schema(BUILTIN[0].schema)

    def refused_at(self, **change: Any) -> str:
        """Assert that a changed notice is refused, and return the path of the error."""
        error = self.assertRaises(BadPayload, self.schema.check, _NOTICE | change, "/payload/payload")
        return str(error.details["path"])

    def test_accepts_each_scope(self) -> None:
        """Every scope is valid with its own id, up to the largest integers."""
        self.schema.check(_NOTICE)
        for scope in ("sector", "corp", "player"):
            self.schema.check(_NOTICE | {"scope": scope, f"{scope}_id": 2**53 - 1, "ttl_s": 2**53 - 1})

    def test_refusals_name_the_path(self) -> None:
        """A refusal names the invalid member by a JSON pointer."""
        self.assertEqual(self.refused_at(scope="sector"), "/payload/payload/sector_id")
        self.assertEqual(self.refused_at(corp_id=1), "/payload/payload/corp_id")
        self.assertEqual(self.refused_at(scope="all"), "/payload/payload/scope")
        self.assertEqual(self.refused_at(message=""), "/payload/payload/message")
        self.assertEqual(self.refused_at(message="m" * 4001), "/payload/payload/message")
        self.assertEqual(self.refused_at(ttl_s=True), "/payload/payload/ttl_s")
        self.assertEqual(self.refused_at(ttl_s=0), "/payload/payload/ttl_s")
        self.assertEqual(self.refused_at(colour="red"), "/payload/payload/colour")
