"""Call operations over HTTP, with treq (docs/api.rst)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import treq
from hyperlink import EncodedURL
from OpenSSL import SSL
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectError, ConnectingCancelledError, DNSLookupError
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import (  # type: ignore[attr-defined]
    Agent,
    HTTPConnectionPool,
    RequestGenerationFailed,
    RequestNotSent,
    RequestTransmissionFailed,
    ResponseDone,
    ResponseFailed,
    ResponseNeverReceived,
)
from twisted.web.http import PotentialDataLoss

from s2s.admin.operations.operation import Operation, decode, drop_none, encode
from s2s.admin.operations.pages import Page
from s2s.errors import BadReply, OperatorError, Refused, UnknownOutcome, Unreachable, harmless

R = TypeVar("R")
T = TypeVar("T")

CONNECT_S: Final = 5.0
#: Seconds that an idle connection is kept for the next request.
KEEP_S: Final = 30
#: Seconds that an answer may take, in addition to the wait that a request itself asks for: an engine's answer takes
#: longest.
ANSWER_S: Final = 80.0
#: The longest answer, in bytes: a page, whose last row may be long.
ANSWER_BYTES: Final = 32 << 20


class Transport:
    """The connection to one server.

    :param url: the server's URL, such as ``http://127.0.0.1:8321``; a path in it is kept as a prefix.
    :param token: a token of ``s2s tokens add``.
    :param http: an object with treq's ``request``; tests pass a ``treq.testing.StubTreq``.
    :raises OperatorError: the URL or the token cannot be used.
    """

    def __init__(self, url: str, token: str, *, http: Any = None) -> None:
        self._url = _read_url(url)
        if not token.isascii() or not token.isprintable() or " " in token or not token:
            raise OperatorError("the token cannot be used: it is one word, as s2s tokens add wrote it")
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._pool: HTTPConnectionPool | None = None
        from twisted.internet import reactor  # noqa: PLC0415 - importing it installs it

        self._reactor: Any = reactor
        if http is None:
            self._pool = HTTPConnectionPool(reactor)
            # Shorter than the server's own limit: a request on a connection that is being closed may or may not arrive.
            self._pool.cachedConnectionTimeout = KEEP_S
            agent: Any = Agent(reactor, connectTimeout=CONNECT_S, pool=self._pool)
            http = treq.client.HTTPClient(agent)
        self._http = http

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._url!r})"

    def close(self) -> Deferred[Any]:
        """Close the idle connections."""
        return succeed(None) if self._pool is None else self._pool.closeCachedConnections()

    def call(
        self,
        operation: Operation[R],
        *,
        path_params: Mapping[str, Any] | None = None,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        idem_key: str | None = None,
    ) -> Deferred[R]:
        """Call any operation by its declaration.

        :param path_params: the parameters of its path.
        :param query: the parameters of its query; those that are ``None`` are omitted, as in ``body``.
        """
        return Deferred.fromCoroutine(self._call(operation, path_params or {}, query or {}, body or {}, idem_key))

    async def walk(self, operation: Operation[Page[T]], **query: Any) -> AsyncIterator[T]:
        """Yield every row of a list, page by page."""
        cursor = None
        while True:
            page = await self.call(operation, query={**query, "cursor": cursor})
            for row in page.items:
                yield row
            cursor = page.next_cursor
            if cursor is None:
                return

    async def _call(
        self,
        operation: Operation[R],
        path_params: Mapping[str, Any],
        query: Mapping[str, Any],
        body: Mapping[str, Any],
        idem_key: str | None,
    ) -> R:
        path = operation.path.format_map({name: quote(str(value), safe="") for name, value in path_params.items()})
        asked = urlencode(drop_none(query))
        wait_s = query.get("wait") or 0
        status, raw = await self._send(
            operation.method,
            f"{self._url}{path}{f'?{asked}' if asked else ''}",
            {**self._headers, **({} if idem_key is None else {"Idempotency-Key": idem_key})},
            None if operation.method == "GET" else encode(drop_none(body)),
            ANSWER_S + wait_s,
        )
        try:
            data = json.loads(raw)
            if status in operation.statuses:
                return decode(data, operation)
            refused = Refused(str(data.pop("code")), str(data.pop("detail")), data)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if operation.method != "GET" and (status < 300 or status >= 500):
                # The answer is a gateway's: the server behind it may have executed the request.
                raise self._unknown(operation.method, f"status {status} came from something else, a gateway?") from None
            raise BadReply(f"{self._url} does not answer as a server of s2s: status {status}") from None
        raise refused

    async def _send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, timeout_s: float
    ) -> tuple[int, bytes]:
        late = f"it did not come within {timeout_s:g} s"
        try:
            exchange = Deferred.fromCoroutine(self._exchange(method, url, headers, body))
            return await exchange.addTimeout(timeout_s, self._reactor, lambda *_: Failure(self._unknown(method, late)))
        except (ConnectError, DNSLookupError, ConnectingCancelledError, RequestNotSent) as error:
            raise Unreachable(f"{self._url} does not answer: {_why(error)}") from None
        except (
            RequestGenerationFailed,
            RequestTransmissionFailed,
            ResponseFailed,
            ResponseNeverReceived,
        ) as error:
            reasons = [reason.value for reason in getattr(error, "reasons", ())]
            if any(isinstance(reason, SSL.Error) for reason in reasons):
                raise Unreachable(f"{self._url} does not answer: TLS failed: {_why(*reasons)}") from None
            why = _why(*(reasons or [error]))
            if not isinstance(error, ResponseFailed) or isinstance(error, ResponseNeverReceived):
                speaks = ", and does that speak TLS" if self._url.startswith("https") else ""
                why += f" (is this the port of the server's --http{speaks}?)"
            raise self._unknown(method, why) from None

    def _unknown(self, method: str, why: str) -> UnknownOutcome:
        cure = "ask again" if method == "GET" else "look whether it was done before you ask again"
        return UnknownOutcome(f"the answer of {self._url} was lost: {why}: {cure}")

    async def _exchange(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> tuple[int, bytes]:
        # Do not follow a redirect: the token is for this server only.
        response = await self._http.request(
            method, _Url.from_text(url), headers=headers, data=body, allow_redirects=False, unbuffered=True
        )
        answer = _Answer()
        response.deliverBody(answer)
        return response.code, await answer.whole


def _read_url(url: str) -> str:
    """Return a server's URL in ASCII and without a trailing slash.

    :raises OperatorError: it is not a valid URL; the message quotes no part of it, which may be a password.
    """
    wrong = OperatorError("the URL of the server cannot be used: write http://HOST:PORT or https://HOST:PORT")
    try:
        parts = urlsplit(url)
        is_ours = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        if not is_ours or parts.query or parts.fragment or parts.username is not None:
            raise wrong
        return _Url.from_text(url).to_uri().to_text().rstrip("/")
    except ValueError:
        raise wrong from None


class _Url(EncodedURL):
    """A URL whose host may be an IPv6 address, which hyperlink treats as a name (its issues 68 and 188)."""

    def to_uri(self) -> EncodedURL:
        """Return the URL in ASCII."""
        return self if ":" in self.host else super().to_uri()


class _Answer(Protocol):
    """Collects the body of an answer.

    :ivar whole: fires with the body; cancelling it closes the connection.
    """

    transport: Any

    def __init__(self) -> None:
        self._body = bytearray()
        self.whole: Deferred[bytes] = Deferred(lambda _: self._leave())

    def dataReceived(self, data: bytes) -> None:
        """Store a part of the body."""
        self._body += data
        if len(self._body) > ANSWER_BYTES and not self.whole.called:
            self.whole.errback(BadReply(f"the answer has more than {ANSWER_BYTES} bytes"))
            self._leave()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Finish: the body is complete, or the connection broke."""
        if self.whole.called:
            return
        if reason.check(ResponseDone, PotentialDataLoss):
            self.whole.callback(bytes(self._body))
        else:
            self.whole.errback(reason)

    def _leave(self) -> None:
        if self.transport is not None:
            self.transport.loseConnection()


def _why(*errors: BaseException) -> str:
    return "; ".join(harmless(str(error)) or type(error).__name__ for error in errors)
