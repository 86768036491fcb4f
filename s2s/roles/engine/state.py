"""The state of an engine (docs/protocol.rst, "States of an engine")."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from s2s.errors import NotReady, ShuttingDown
from s2s.link.dispatcher import Responder
from s2s.protocol.received import Request


class EngineState:
    """The actual state of an engine, derived from the wanted state and the jobs in progress.

    :ivar wanted: ``running`` or ``paused``; ``None`` until it is known.
    :ivar is_draining: the engine is shutting down.
    """

    def __init__(self) -> None:
        self.wanted: str | None = None
        self.is_draining = False
        self._jobs = 0

    @property
    def state(self) -> str:
        """``starting``, ``running``, ``pausing``, ``paused`` or ``draining``."""
        if self.is_draining:
            return "draining"
        if self.wanted is None:
            return "starting"
        if self.wanted == "paused":
            return "pausing" if self._jobs else "paused"
        return "running"

    @contextmanager
    def job(self) -> Iterator[None]:
        """Count a job in progress: until it is finished, a paused engine is ``pausing``."""
        self._jobs += 1
        try:
            yield
        finally:
            self._jobs -= 1

    def check_started(self) -> None:
        """Refuse a control request while the wanted state is unknown.

        :raises NotReady: the engine is starting.
        """
        if self.wanted is None and not self.is_draining:
            raise NotReady("the engine is starting", retry_after_ms=1000)

    def check_taking(self) -> None:
        """Refuse new work while starting and while shutting down.

        :raises NotReady: the engine is starting.
        :raises ShuttingDown: the engine is draining.
        """
        if self.is_draining:
            raise ShuttingDown("the engine is shutting down")
        self.check_started()


def guard(check: Callable[[], None], responder: Responder) -> Responder:
    """Return a responder that answers only if a check does not refuse.

    :param check: raises a :class:`~s2s.errors.WireError` to refuse.
    """

    def respond(request: Request) -> Any:
        check()
        return responder(request)

    return respond
