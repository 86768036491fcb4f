"""``notice.publish``: the built-in command, which adds a row to ``notices``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, ClassVar

from s2s.handlers.commands.handler import BatchCommandHandler
from s2s.store.cursor import own
from s2s.store.driver import Cursor
from s2s.store.tables import notices
from s2s.store.tables.commands import Command


class NoticePublish(BatchCommandHandler):
    """Publishes a notice to everyone, or to a sector, a corporation or a player."""

    cmd_type = "notice.publish"
    schema: ClassVar[Mapping[str, Any]] = json.loads(
        resources.files("s2s.handlers.commands").joinpath("schemas").joinpath("notice.publish.json").read_text("utf-8")
    )

    def run_batch(self, txn: Cursor, commands: Sequence[Command]) -> None:
        """Insert the notices in one statement; ``cmd_id`` is unique among the notices."""
        notices.insert_batch(own(txn), [(command.cmd_id, command.payload) for command in commands])
