"""The wrapper around every operation: host check, sign-in, limits, JSON and errors (docs/api.rst).

It uses no routing framework, because the operations are data already (:mod:`s2s.admin.operations`): routes, checks and
the OpenAPI document are derived from them, and decorators would repeat them.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from s2s.admin.http import problems
from s2s.admin.http.operation_runner import ClientRequest, OperationRunner
from s2s.admin.http.problems import problem
from s2s.admin.http.routes import Routes, allowed, read_query, wrong_method
from s2s.admin.http.sign_in import Caller, SignIn
from s2s.admin.operations.operation import BODY_BYTES, IDEM_KEY, Operation, OperationReply, OperationRequest, encode
from s2s.errors import BadEnvelope, BadPayload, NotFound, S2SError, ShuttingDown
from s2s.protocol import canonical
from s2s.runtime.waiters import Waiters

#: Host names that are always accepted. IP addresses are accepted too, because DNS rebinding needs a name.
LOCAL: Final = frozenset({"localhost"})
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(:[0-9]{1,5})?")


@dataclass(frozen=True)
class Plain:
    """A path that is answered without the database, and so is not an operation.

    :param give: returns the body; the argument is whether the request has a valid token.
    :param is_open: whether the path is answered without a token or with a wrong one, under any Host, with any query,
        and to OPTIONS as to GET, because a load balancer may send such requests.
    """

    name: str
    path: str
    summary: str
    reply: Mapping[str, Any]
    give: Callable[[bool], Awaitable[Any]]
    is_open: bool = False


class Api(Resource):
    """Answers every request.

    :param operations: the operations that the server offers.
    :param plain: the paths that are no operations.
    :param hosts: further host names that clients may use for this server.
    :ivar counts: the number of requests by outcome.
    """

    log = Logger()
    isLeaf = True

    def __init__(
        self,
        runner: OperationRunner,
        sign_in: SignIn,
        operations: Iterable[Operation[Any]],
        plain: Collection[Plain],
        hosts: Collection[str] = (),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._runner = runner
        self._sign_in = sign_in
        self._routes = Routes(operations)
        self._plain = {each.path.encode(): each for each in plain}
        self._hosts = LOCAL | {host.lower() for host in hosts}
        self._under_way: set[ClientRequest] = set()
        self._until_idle: Waiters[None] = Waiters()
        self.is_stopping = False
        self.counts: Counter[str] = Counter()

    def drain(self) -> Deferred[None]:
        """Refuse new requests from now on.

        :returns: fires when every request under way is answered.
        """
        self.is_stopping = True
        idle = self._until_idle.wait()
        self._tell_idle()
        return idle

    def render(self, request: Request) -> int:
        """Start to answer a request."""
        visit = ClientRequest()
        request.notifyFinish().addErrback(lambda _: visit.leave())
        self._under_way.add(visit)
        answering = Deferred.fromCoroutine(self._answer(request, visit))
        answering.addErrback(lambda failure: self.log.failure("an answer could not be sent", failure))
        answering.addBoth(self._answered, visit)
        return NOT_DONE_YET

    def _answered(self, _: object, visit: ClientRequest) -> None:
        self._under_way.discard(visit)
        self._tell_idle()

    def _tell_idle(self) -> None:
        if not self._under_way:
            self._until_idle.fire(None)

    def body_bytes(self, method: bytes, path: bytes) -> int:
        """Return the maximum length of the body of a request; a request for no operation is refused in any case.

        :param path: the path without the query.
        """
        try:
            return self._routes.find(method.decode("ascii", "replace"), path)[0].body_bytes
        except S2SError:
            return BODY_BYTES

    async def _answer(self, request: Request, visit: ClientRequest) -> None:
        headers = {"Content-Type": "application/json"}
        try:
            reply = await self._serve(request, visit)
            status, body = reply.status, encode(reply.value) if reply.body is None else reply.body
            if reply.location is not None:
                headers["Location"] = reply.location
        except CancelledError:
            self.counts["left"] += 1
            return
        except Exception as error:
            said = problem(error)
            status, body = said.status, encode(said.body)
            headers = {"Content-Type": problems.CONTENT_TYPE, **said.headers}
        if status >= 400:
            self.counts["failed" if status >= 500 else "refused"] += 1
        if not visit.is_left:
            _write(request, status, headers, body)

    async def _serve(self, request: Request, visit: ClientRequest) -> OperationReply[Any]:
        if self.is_stopping:
            raise ShuttingDown("the server is shutting down", retry_after_ms=1000)
        method = "GET" if request.method == b"HEAD" else request.method.decode("ascii", "replace")
        path, _, query = request.uri.partition(b"?")
        plain = self._plain.get(path)
        if plain is not None and plain.is_open:
            if method not in ("GET", "OPTIONS"):
                raise wrong_method(method, allowed(["GET", "OPTIONS"]))
            sent = request.requestHeaders.getRawHeaders(b"authorization") or []
            return OperationReply(await plain.give(any(self._sign_in.knows(each.decode("latin-1")) for each in sent)))
        near = self._plain.get(b"/" + path.strip(b"/"))
        if plain is None and near is not None and near.is_open:
            # The cure for the Host or the token would not help a load balancer.
            raise NotFound("a path with another slash is another path: use /healthz or /readyz")
        self._check_host(request)
        caller = await self._sign_in.caller(_header(request, b"authorization"), _address(request))
        if plain is not None:
            await self._runner.wait_turn(caller.access, visit)
            if method != "GET":
                raise wrong_method(method, allowed(["GET"]))
            if query:
                raise BadPayload("this path takes no query", path="/query")
            return OperationReply(await plain.give(True))
        try:
            operation, where = self._routes.find(method, path)
        except S2SError:
            await self._runner.wait_turn(caller.access, visit)
            raise
        if operation.is_write:
            # An observer is refused, after its body is parsed.
            await self._runner.wait_turn(caller.access, visit)
        try:
            ask = self._ask(request, operation, caller, where, query)
            reply = await self._runner.perform(operation, ask, visit)
        except BadPayload:
            # Most are refused before any transaction.
            await self._runner.wait_turn(caller.access, visit)
            raise
        if operation.is_write:
            self.counts["writes"] += 1
        return reply

    def _check_host(self, request: Request) -> None:
        """Refuse a request whose Host is not a name of this server, as a protection against DNS rebinding."""
        match = _HOST.fullmatch(_header(request, b"host") or "")
        host = match[1].lower().rstrip(".") if match else ""
        if host in self._hosts:
            return
        try:
            ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            raise problems.wrong_host() from None

    def _ask(
        self, request: Request, operation: Operation[Any], caller: Caller, where: Mapping[str, Any], query: bytes
    ) -> OperationRequest:
        key = _header(request, b"idempotency-key")
        if key is not None:
            wrong = IDEM_KEY.explain(key, "/header/Idempotency-Key")
            if wrong is not None or not operation.takes_key:
                why = wrong[1] if wrong else "this request takes none"
                raise BadPayload(f"the Idempotency-Key: {why}", path="/header/Idempotency-Key")
        return OperationRequest(
            caller.actor,
            caller.access,
            where,
            read_query(operation.query, query),
            _body(request, operation),
            key,
        )


def _body(request: Request, operation: Operation[Any]) -> Any:
    """Parse the body as one JSON object, as strictly as a frame; an empty body is an empty object."""
    raw = request.content.read() if operation.method != "GET" and request.content is not None else b""
    if not raw:
        return {}
    coding = (_header(request, b"content-encoding") or "identity").strip().lower()
    if coding != "identity":
        raise problems.wrong_coding()
    media_type = (_header(request, b"content-type") or "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise problems.wrong_media_type()
    return canonical.parse(raw)


def _header(request: Request, name: bytes) -> str | None:
    """Return the value of a header, which may contain any bytes.

    :raises BadEnvelope: the header occurs twice; readers of the first and of the last value would disagree.
    """
    values = request.requestHeaders.getRawHeaders(name) or []
    if len(values) > 1:
        raise BadEnvelope(f"the header {name.decode()} occurs twice")
    return values[0].decode("latin-1") if values else None


def _address(request: Request) -> str:
    return str(getattr(request.getClientAddress(), "host", ""))


def _write(request: Request, status: int, headers: Mapping[str, str], body: bytes) -> None:
    request.setResponseCode(status, HTTPStatus(status).phrase.encode())
    for name, value in {**SAFE, **headers, "Content-Length": str(len(body))}.items():
        request.setHeader(name, value)
    request.write(body)
    request.finish()


#: Headers of every response, which forbid caching it and running it as code.
SAFE: Final = {
    "Server": "s2s",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
