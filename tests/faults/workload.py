"""The clients of a campaign: engines that push, and whoever types broadcasts, orders, settings and keys."""

from __future__ import annotations

import http.client
import random
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

import psycopg2

from s2s.store import keys, rotation
from tests.faults.history import History
from tests.support.flood import Linked
from tests.support.http import ask
from tests.support.peer import PUSH, Frame, Key, Peer

_WINDOW: Final = 64
#: Of so many pushes one is a duplicate, one a conflict, one scheduled, and one fails at first.
_ODD: Final = 20
#: What a scheduled push waits, in seconds, at most.
_LATER_S: Final = 6


class Pusher(Linked):
    """An engine of ours: pushes new keys at a rate, and again whatever came to no end, until it does.

    :ivar is_reading: whether it reads at all; a campaign may have it stop.
    """

    def __init__(self, name: str, history: History, connect: Callable[[], Peer], rate: float, seed: int) -> None:
        super().__init__(connect, name)
        self._history = history
        self._rate = rate
        self._dice = random.Random(seed)
        self._again: deque[Frame] = deque()
        #: By the frame's id: what it pushes, and the number of its operation.
        self._flying: dict[str, tuple[Frame, int]] = {}
        self._contents: list[Frame] = []
        self._made = 0
        self.is_reading = True
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Push until all has come to an end."""
        try:
            super().run()
        except BaseException as error:
            self.failure = error

    @property
    def is_done(self) -> bool:
        """Whether nothing new is to be made, and all that was has come to an end."""
        return self._is_over.is_set() and not self._again and not self._flying

    def _lost(self) -> None:
        for push, number in self._flying.values():
            self._history.end(number, self.name, "push", "unknown")
            self._again.append(push)
        self._flying.clear()
        time.sleep(self._dice.uniform(0.05, 0.2))

    def _turn(self, peer: Peer) -> None:
        frames = []
        while len(self._flying) < _WINDOW and (push := self._next()) is not None:
            frame = peer.envelope(PUSH, push)
            asked = {"key": push["idem_key"], "content": push["payload"], "due_at": push.get("due_at")}
            number = self._history.invoke(self.name, "push", **asked)
            self._flying[frame["id"]] = (push, number)
            frames.append(frame)
        peer.write_all(frames)
        if not self.is_reading:
            time.sleep(0.05)
            return
        while peer.has_more or select.select([peer.link], [], [], 0.02)[0]:
            frame = peer.read()
            assert frame is not None, "the link ended"
            if frame.get("ack_of") in self._flying:
                self._take(*self._flying.pop(frame["ack_of"]), frame["payload"])

    def _next(self) -> Frame | None:
        """Give what is to be pushed now."""
        if self._again:
            return self._again.popleft()
        if self._is_over.is_set() or self._made >= (time.monotonic() - self._began) * self._rate:
            return None
        self._made += 1
        odd = self._dice.randrange(_ODD)
        if odd < 2 and self._contents:
            before = self._dice.choice(self._contents[-1000:])
            content = dict(before["payload"])
            if odd == 1:
                content["other"] = True
            return {**before, "payload": content}
        content = {"n": self._made, "fails": 1 if odd == 2 else 0}
        push: Frame = {"cmd_type": "faults.mark", "idem_key": f"{self.name}-{self._made}", "payload": content}
        if odd == 3:
            push["due_at"] = int(time.time()) + self._dice.randint(1, _LATER_S)
        push["priority"] = self._dice.choice((50, 100, 150))
        self._contents.append(push)
        return push

    def _take(self, push: Frame, number: int, answer: Frame) -> None:
        if answer.get("accepted") is True:
            self._history.end(number, self.name, "push", "ok", cmd_id=answer["cmd_id"], duplicate=answer["duplicate"])
            return
        code, details = answer["code"], answer["details"]
        told = {"code": code, "retry_after_ms": details.get("retry_after_ms")}
        self._history.end(number, self.name, "push", "fail", **told)
        # A conflict is a conflict for good.
        if code != "idem_conflict":
            self._again.append(push)
            time.sleep(0.01)


class Typist(threading.Thread):
    """Whoever types into the database and asks the HTTP API: emits, broadcasts, orders, settings, keys.

    :param api: the base URL.
    :param ring: the keys that peers of ours verify with; new ones are added.
    """

    def __init__(
        self, history: History, url: str, api: str, token: str, ring: dict[str, Key], sectors: int, seed: int
    ) -> None:
        super().__init__(name="typist", daemon=True)
        self._history = history
        self._url, self._api, self._token, self._ring = url, api, token, ring
        self._sectors = sectors
        self._dice = random.Random(seed)
        self._over = threading.Event()
        self._count = 0
        #: Orders of which nobody has said yet that they are given.
        self._orders: deque[tuple[str, Mapping[str, Any]]] = deque()
        self.failure: BaseException | None = None

    def finish(self) -> None:
        """Type nothing new; it ends when all orders are given."""
        self._over.set()

    def run(self) -> None:
        """Type."""
        try:
            while not (self._over.is_set() and not self._orders):
                if not self._over.is_set():
                    self._type()
                if self._orders:
                    self._order()
                time.sleep(0.1)
        except BaseException as error:
            self.failure = error

    def _type(self) -> None:
        self._count += 1
        count = self._count
        emitted = [f"emit-{count}-{n}" for n in range(5)]
        self._in_sql("emit", {"keys": emitted}, lambda txn: _emit(txn, emitted))
        if count % 3 == 0:
            self.broadcast(f"cast-{count}", 2)
        if count % 5 == 0:
            status = self._dice.choice(("fedspace", "neutral", "port_closed"))
            params = {"sector_id": self._dice.randint(1, self._sectors), "status": status}
            self._orders.append((f"order-{count}", params))
        if count % 50 == 0:
            self._configure(self._dice.randint(16, 1024))
        if count % 100 == 0:
            self._rotate(f"key-{count}")

    def broadcast(self, name: str, many: int) -> None:
        """Type so many broadcasts at once."""
        messages = [f"{name}-{n}" for n in range(many)]

        def insert(txn: Any) -> None:
            txn.execute("insert into broadcasts (message) select unnest(%s::text[])", (messages,))

        self._in_sql("broadcast", {"messages": messages}, insert)

    def _in_sql(self, op: str, asked: Mapping[str, Any], work: Callable[[Any], Any]) -> None:
        """Do something in one transaction; while its COMMIT is under way nobody knows."""
        number = self._history.invoke(self.name, op, **asked)
        is_done = False
        try:
            conn = psycopg2.connect(self._url, connect_timeout=3, options="-c statement_timeout=15000")
            try:
                with conn.cursor() as txn:
                    work(txn)
                is_done = True
                conn.commit()
            finally:
                conn.close()
        except psycopg2.Error:
            self._history.end(number, self.name, op, "unknown" if is_done else "fail")
        else:
            self._history.end(number, self.name, op, "ok")

    def _order(self) -> None:
        key, params = self._orders.popleft()
        number = self._history.invoke(self.name, "order", key=key, params=params)
        try:
            answer = ask(
                self._api,
                "POST",
                "/v1/orders/world.set_sector_status.v1",
                self._token,
                params,
                headers={"Idempotency-Key": key},
            )
        except ConnectionRefusedError:
            self._history.end(number, self.name, "order", "fail", why="nobody is there")
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._history.end(number, self.name, "order", "unknown", why=str(error))
        else:
            kind = "ok" if answer.status < 300 else "unknown"
            self._history.end(number, self.name, "order", kind, status=answer.status)
            if kind == "ok":
                return
        # The same key again is the same order.
        self._orders.append((key, params))

    def _configure(self, value: int) -> None:
        number = self._history.invoke(self.name, "config", value=value)
        try:
            answer = ask(self._api, "PUT", "/v1/config/relay.window", self._token, {"value": value})
        except (OSError, http.client.HTTPException, ValueError):
            self._history.end(number, self.name, "config", "unknown")
            return
        if answer.status == 200:
            told = {"version": answer.body["version"], "changed": answer.body["changed"]}
            self._history.end(number, self.name, "config", "ok", **told)
        else:
            self._history.end(number, self.name, "config", "unknown", status=answer.status)

    def _rotate(self, key_id: str) -> None:
        """Add a key with which both roles sign from now on; the older ones still verify."""
        secret = keys.random_secret()
        self._ring[key_id] = Key(key_id, secret)

        def add(txn: Any) -> None:
            keys.add(txn, key_id, secret, "any")
            rotation.activate(txn, key_id)

        self._in_sql("rotate", {"key": key_id}, add)


def _emit(txn: Any, names: list[str]) -> None:
    txn.execute(
        "insert into outbox (cmd_type, idem_key, payload) select 'notice.publish', name,"
        " jsonb_build_object('scope', 'global', 'severity', 'info', 'message', name) from unnest(%s::text[]) name",
        (names,),
    )
