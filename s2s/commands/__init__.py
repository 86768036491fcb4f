"""What a command type is, and the ones that come with s2s (docs/protocol.rst, "Commands").

To add one, write a module and one entry in :data:`BUILTIN`.
"""

from __future__ import annotations

from typing import Final

from s2s.commands.kind import BatchedCommandType, CommandType, ICommandType, registry
from s2s.commands.notice_publish import NoticePublish
from s2s.store.commands import Command

BUILTIN: Final[tuple[CommandType, ...]] = (NoticePublish(),)

__all__ = ["BUILTIN", "BatchedCommandType", "Command", "CommandType", "ICommandType", "registry"]
