"""Take the operators' control requests from the database, and send them over the links of this server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from twisted.internet import task
from twisted.internet.defer import Deferred, gatherResults
from twisted.logger import Logger
from twisted.python.failure import Failure

from s2s.errors import BadReply, DatabaseError, Refused, S2SError, harmless
from s2s.link.connection import Link
from s2s.link.factory import ServerLinks
from s2s.protocol.catalogue import BY_NAME
from s2s.runtime.clock import Clock
from s2s.runtime.status_log import status_log
from s2s.store.cursor import check_readable
from s2s.store.poll_loop import PollLoop
from s2s.store.pool import Database
from s2s.store.tables import control_requests, engines
from s2s.store.tables.control_requests import Steering
from s2s.store.tables.engines import LinkRow


class ControlSender:
    """Writes this server's links to ``engine_links``, and sends the requests in ``steering`` to its engines."""

    log = Logger()

    def __init__(self, database: Database, links: ServerLinks, boot_id: str, clock: Clock) -> None:
        self._database = database
        self._links = links
        self._boot_id = boot_id
        self._is_showing = self._is_changed = False
        #: The links by name and key, as they are or will soon be in the table.
        self._shown: dict[tuple[str, str], Link] = {}
        #: The number of requests that were taken and are not answered yet.
        self._flying = 0
        self._loop = PollLoop("steering", self._poll_once, clock.scheduler)
        self.wake = self._loop.wake
        self._showing = task.LoopingCall(self.links_changed)
        self._showing.clock = clock.scheduler

    def start(self) -> None:
        """Start taking requests and writing the links."""
        self._loop.start()
        self._showing.start(engines.REFRESH_S)

    def stop(self) -> Deferred[Any]:
        """Stop taking requests.

        :returns: fires when no poll is in progress and this server's links have been removed from the table.
        """
        if self._showing.running:
            self._showing.stop()
        leaving = self._database.run(engines.show_links, self._boot_id, [])
        return gatherResults([self._loop.stop(), leaving.addErrback(self._unless_away)])

    def links_changed(self) -> None:
        """Write the links again: they have changed, or the refresh is due."""
        # Remove a link first, so that the newest one is last.
        self._shown = {}
        for link in self._links.engines:
            place = _name(link), str(link.session.peer_key_id)
            self._shown.pop(place, None)
            self._shown[place] = link
        if self._is_showing:
            self._is_changed = True
            return
        self._is_showing, self._is_changed = True, False
        rows = [_row(key_id, link) for (_, key_id), link in self._shown.items()]
        showing = self._database.run(engines.show_links, self._boot_id, rows)
        showing.addErrback(self._unless_away).addBoth(self._showed)

    def _showed(self, _: object) -> None:
        self._is_showing = False
        if self._is_changed and self._showing.running:
            self.links_changed()

    async def _poll_once(self, _: int) -> float | None:
        """Take requests from the table and start sending them."""
        room = control_requests.MOST - self._flying
        if not self._shown or not room:
            return None
        frame_size = max(link.session.max_frame for link in self._shown.values())
        taken = await self._database.run(control_requests.take, self._boot_id, tuple(self._shown), room, frame_size)
        for each in taken:
            self._flying += 1
            Deferred.fromCoroutine(self._steer(each)).addErrback(self._unless_away).addBoth(self._landed)
        return 0.0 if len(taken) == room else None

    def _landed(self, _: object) -> None:
        self._flying -= 1
        if self._flying == control_requests.MOST - 1:
            self.wake()

    async def _steer(self, asked: Steering) -> None:
        is_ok: bool | None = None
        how = "no answer"
        payload: Mapping[str, Any]
        link = next(
            (
                link
                for (name, key_id), link in reversed(self._shown.items())
                if name == asked.engine and asked.key_id in (key_id, None)
            ),
            None,
        )
        try:
            if link is None:
                payload = {"message": "the link was lost before the request was sent"}
            elif "server" not in getattr(BY_NAME.get(asked.type), "sent_by", ()):
                payload = {"message": f"a server does not send '{harmless(asked.type)}'"}
            elif asked.payload is None:
                payload = {"message": "its payload is longer than a frame: nothing was sent"}
            else:
                check_readable(asked.payload, "payload")
                is_ok, payload = True, await link.call(asked.type, asked.payload)
                how = "done"
        except Refused as error:
            how = "refused"
            is_ok, payload = False, {"code": error.code, "message": error.message, "details": dict(error.details)}
        except S2SError as error:
            is_ok, payload = None, {"message": str(error)}
            if isinstance(error, BadReply):
                how, payload = "an answer that is not valid", {"code": error.code, **payload}
        await self._database.run(control_requests.answer, asked.request_id, is_ok, payload)
        if asked.type not in _UNTOLD:
            status_log.info(
                "{type} to {engine!r}{key} by {actor!r}: {how}",
                type=harmless(asked.type),
                engine=harmless(asked.engine),
                key=f" (key {harmless(asked.key_id)})" if asked.key_id else "",
                actor=harmless(asked.actor),
                how=how,
            )

    def _unless_away(self, failure: Failure) -> None:
        # The pool has logged that the database is away.
        if not failure.check(DatabaseError):
            self.log.failure("internal error in the control sender", failure)


#: The types that are not logged: each listing of the engines sends a health check.
_UNTOLD: Final = frozenset({"s2s.health.check"})


def _name(link: Link) -> str:
    name = link.peer.get("name")
    return name if isinstance(name, str) else ""


def _row(key_id: str, link: Link) -> LinkRow:
    boot_id = link.peer.get("boot_id")
    return LinkRow(key_id, _name(link), boot_id if isinstance(boot_id, str) else None, link.address)
