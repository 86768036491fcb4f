"""What a command type is, and the ones that come with s2s (docs/protocol.rst, "Commands").

To add one, write a module and one entry in :data:`BUILTIN`.
"""

from __future__ import annotations

from typing import Final

from s2s.handlers.commands.handler import BatchCommandHandler, CommandHandler, ICommandHandler, registry
from s2s.handlers.commands.notice_publish import NoticePublish
from s2s.store.tables.commands import Command

BUILTIN: Final[tuple[CommandHandler, ...]] = (NoticePublish(),)

__all__ = ["BUILTIN", "BatchCommandHandler", "Command", "CommandHandler", "ICommandHandler", "registry"]
