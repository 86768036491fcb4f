"""The declaration of a command handler, and the built-in ones (docs/protocol.rst, "Commands").

To add a built-in handler, write a module and one entry in :data:`BUILTIN`.
"""

from __future__ import annotations

from typing import Final

from s2s.handlers.commands.handler import BatchCommandHandler, CommandHandler, ICommandHandler, registry
from s2s.handlers.commands.notice_publish import NoticePublish
from s2s.store.tables.commands import Command

BUILTIN: Final[tuple[CommandHandler, ...]] = (NoticePublish(),)

__all__ = ["BUILTIN", "BatchCommandHandler", "Command", "CommandHandler", "ICommandHandler", "registry"]
