"""The workload of operators: SQL statements, and requests over the HTTP API that may be cut off at any moment."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg2

from campaigns.faults.history import History
from s2s.store.tables import keys, rotation
from tests.support.http import ask
from tests.support.peer import Key

#: Seconds between two rounds, and most requests in a round.
_ROUND_S: Final = 0.1
_REQUESTS: Final = 5
#: Number of rounds between two actions of each kind. Outbox rows are emitted in every round.
_BROADCAST, _ORDER, _CONFIGURE, _PAUSE, _ROTATE = 3, 5, 50, 70, 100
#: On average one of _ODD orders names a sector that does not exist; one of _RETRIED cancelled commands is retried.
_ODD: Final = 5
_RETRIED: Final = 2


@dataclass(frozen=True)
class PendingRequest:
    """A request that is repeated until its outcome is certain.

    :param op: the name of its operation in the history.
    :param asked: the arguments of that operation.
    :param then: the request to make after this one.
    """

    op: str
    method: str
    path: str
    body: Mapping[str, Any]
    asked: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)
    then: PendingRequest | None = None


class OperatorWorkload(threading.Thread):
    """Emits commands, makes broadcasts and orders, changes settings, adds keys, and controls engines and commands.

    The seed determines the actions of the n-th round, but not its time.

    :param api: the base URL of the API.
    :param known_keys: the keys with which our peers verify; new keys are added.
    :param sectors: number of the world's sectors, whose ids begin with 1.
    """

    def __init__(
        self, history: History, url: str, api: str, token: str, known_keys: dict[str, Key], sectors: int, seed: int
    ) -> None:
        super().__init__(name="operator workload", daemon=True)
        self._history = history
        self._url, self._api, self._token, self._known_keys = url, api, token, known_keys
        self._sectors = sectors
        self._rng = random.Random(seed)
        self._over = threading.Event()
        self._round = 0
        self._wishes: deque[PendingRequest] = deque()
        self.failure: BaseException | None = None

    def finish(self) -> None:
        """Begin nothing new; the thread ends when the outcome of every pending request is certain."""
        self._over.set()

    def run(self) -> None:
        """Run rounds until the end."""
        try:
            while self._wishes or not self._over.is_set():
                if not self._over.is_set():
                    self._type()
                for _ in range(min(_REQUESTS, len(self._wishes))):
                    self._fulfil(self._wishes.popleft())
                time.sleep(_ROUND_S)
        except BaseException as error:
            self.failure = error

    def _type(self) -> None:
        self._round += 1
        count = self._round
        emitted = [f"emit-{count}-{n}" for n in range(5)]
        self._in_sql("emit", {"keys": emitted}, lambda txn: _emit(txn, emitted))
        if count % _BROADCAST == 0:
            self.broadcast(f"cast-{count}", 2)
        if count % _ORDER == 0:
            self._order(f"order-{count}")
        if count % _CONFIGURE == 0:
            value = self._rng.randint(16, 1024)
            self._wishes.append(
                PendingRequest("config", "PUT", "/v1/config/relay.window", {"value": value}, asked={"value": value})
            )
        if count % _PAUSE == 0:
            self._wishes.append(_steer("pause", then=_steer("resume")))
        if count % _ROTATE == 0:
            self._rotate(f"key-{count}")

    # --- by SQL --------------------------------------------------------------------------------------------------

    def broadcast(self, name: str, many: int) -> None:
        """Insert many broadcasts by one statement; callable from any thread."""
        messages = [f"{name}-{n}" for n in range(many)]

        def insert(txn: Any) -> None:
            txn.execute("insert into s2s.broadcasts (message) select unnest(%s::text[])", (messages,))

        self._in_sql("broadcast", {"messages": messages}, insert)

    def _rotate(self, key_id: str) -> None:
        """Add a key with which both roles sign from now on; the older keys still verify."""
        secret = keys.random_secret()
        self._known_keys[key_id] = Key(key_id, secret)

        def add(txn: Any) -> None:
            keys.add(txn, key_id, secret, "any")
            rotation.activate(txn, key_id)

        self._in_sql("rotate", {"key": key_id}, add)

    def _in_sql(self, op: str, asked: Mapping[str, Any], work: Callable[[Any], Any]) -> None:
        """Run work in one transaction; if the COMMIT fails, the outcome is unknown."""
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

    # --- over HTTP -----------------------------------------------------------------------------------------------

    def take_back(self, cmd_id: int) -> None:
        """Cancel a waiting command, and afterwards retry one of two; callable from any thread."""
        again = None if cmd_id % _RETRIED else _handle("retry", cmd_id)
        self._wishes.append(_handle("cancel", cmd_id, then=again))

    def shut_down(self) -> None:
        """Request the engine's shutdown once; callable from any thread."""
        self._try(_steer("shutdown"))

    def _order(self, key: str) -> None:
        sector_id = self._rng.randint(1, self._sectors)
        if self._rng.randrange(_ODD) == 0:
            sector_id += self._sectors
        params = {"sector_id": sector_id, "status": self._rng.choice(("fedspace", "neutral", "port_closed"))}
        path = "/v1/orders/world.set_sector_status.v1"
        # A repeated request with the same key is the same order.
        asked = {"key": key, "params": params}
        self._wishes.append(PendingRequest("order", "POST", path, params, asked, {"Idempotency-Key": key}))

    def _fulfil(self, wish: PendingRequest) -> None:
        if not self._try(wish):
            self._wishes.append(wish)
        elif wish.then is not None:
            self._wishes.append(wish.then)

    def _try(self, wish: PendingRequest) -> bool:
        """Make a request.

        :returns: whether its outcome is certain and final.
        """
        number = self._history.invoke(self.name, wish.op, **wish.asked)
        try:
            answer = ask(self._api, wish.method, wish.path, self._token, wish.body, headers=wish.headers)
        except ConnectionRefusedError:
            self._history.end(number, self.name, wish.op, "fail", why="nobody is there")
            return False
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._history.end(number, self.name, wish.op, "unknown", why=str(error))
            return False
        told: dict[str, Any] = {"status": answer.status}
        if answer.status < 300:
            told |= {name: answer.body[name] for name in ("version", "changed") if name in answer.body}
            self._history.end(number, self.name, wish.op, "ok", **told)
            return True
        code = answer.body.get("code")
        # The requested state exists already: an earlier try set it, and its answer was lost.
        is_over = code == "stale_version"
        self._history.end(number, self.name, wish.op, "fail" if is_over else "unknown", code=code, **told)
        return is_over


def _steer(verb: str, then: PendingRequest | None = None) -> PendingRequest:
    body = {"reason": "a campaign", **({"grace_ms": 5000} if verb == "shutdown" else {})}
    return PendingRequest(
        "steer", "POST", f"/v1/engines/engine-1/{verb}", body, {"type": f"s2s.engine.{verb}"}, then=then
    )


def _handle(verb: str, cmd_id: int, then: PendingRequest | None = None) -> PendingRequest:
    return PendingRequest(verb, "POST", f"/v1/commands/{cmd_id}/{verb}", {}, {"cmd_id": cmd_id}, then=then)


def _emit(txn: Any, names: list[str]) -> None:
    txn.execute(
        "insert into s2s.outbox (cmd_type, idem_key, payload) select 'notice.publish', name,"
        " jsonb_build_object('scope', 'global', 'severity', 'info', 'message', name) from unnest(%s::text[]) name",
        (names,),
    )
