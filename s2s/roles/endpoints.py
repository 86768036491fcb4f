"""The endpoints where a role listens or connects: Twisted's endpoint strings, with these additions.

- ``ssl:`` takes one more argument, ``trustRoots=PATH``: the server asks each engine for a certificate, and refuses
  certificates that none of these roots signed.
- ``unix:`` uses a lock of the kernel, and not a pid in a file. After a SIGKILL the pid in a file may be that of any
  process, in a container even of this one; with the lock of the kernel the next start works.
- ``haproxy:`` may precede each of these.
- Without ``backlog``, more connections than Twisted's 50 may wait to be accepted.
- Certificates are read again: those of a server on SIGHUP, those of a client for every connection.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, TypeVar

from twisted.internet import ssl
from twisted.internet.defer import Deferred, execute, maybeDeferred
from twisted.internet.endpoints import SSL4ServerEndpoint, UNIXServerEndpoint, clientFromString, serverFromString
from twisted.internet.interfaces import IListeningPort, IProtocolFactory, IStreamClientEndpoint, IStreamServerEndpoint
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.protocols.haproxy._wrapper import HAProxyProtocolWrapper, HAProxyWrappingFactory
from twisted.protocols.tls import TLSMemoryBIOFactory
from zope.interface import implementer

from s2s.errors import one_line
from s2s.link.certificate_dates import why_invalid
from s2s.protocol.limits import Counters
from s2s.roles.handshakes import HandshakeGate
from s2s.runtime import files, own_threads
from s2s.runtime.clock import Clock
from s2s.runtime.line_quota import LineQuota

T = TypeVar("T")

#: The arguments of Twisted's ``unix:`` and ``ssl:`` strings, in the order in which they may stand without their names.
_UNIX: Final = ("address", "mode", "backlog", "lockfile")
_SSL: Final = (
    "port", "privateKey", "certKey", "sslmethod", "interface", "backlog", "extraCertChain", "dhParameters",
)  # fmt: skip
#: The number of connections that the kernel holds until the reactor accepts them. The kernel drops the SYN of a further
#: connection, and the client sends the SYN again after 1 s, then 2 s, then 4 s: with Twisted's 50 the last of 500
#: clients took 9 s. The kernel lowers the number to net.core.somaxconn.
_BACKLOG: Final = 1024
#: The kinds of Twisted's own endpoints that take a backlog, and the number of arguments before it.
_BEFORE_BACKLOG: Final = {"tcp": 2, "tcp6": 1, "ssl": 5}
#: The arguments that cannot be combined with ``trustRoots``.
_ONLY_ONE_WAY: Final = ("sslmethod", "dhParameters")

_ARGUMENT = re.compile(r"(?:\A|:)((?:\\.|[^:\\])*)", re.DOTALL)
_NAMED = re.compile(r"((?:\\.|[^=\\])*)=(.*)", re.DOTALL)
#: The largest size of a file of certificates in bytes. All the public authorities are a quarter of a million bytes.
_MOST_BYTES: Final = 16 << 20
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----\s.+?-----END CERTIFICATE-----", re.DOTALL)


def server_endpoint(reactor: Any, description: str) -> Any:
    """Parse the endpoint string of a server. An endpoint of ``ssl:`` has a method ``reread()``.

    :param description: a string for :func:`twisted.internet.endpoints.serverFromString`, with the additions above.
    :returns: an ``IStreamServerEndpoint``.
    :raises ValueError: one sentence about an error that this module finds. Twisted's parser raises errors of any kind.
    """
    kind, arguments, named = _take_apart(description)
    if kind == "haproxy":
        return _ProxiedEndpoint(reactor, server_endpoint(reactor, description.partition(":")[2]))
    if kind == "unix":
        return _unix(reactor, _by_name(kind, _UNIX, arguments, named))
    if kind == "systemd":
        try:
            return serverFromString(reactor, description)
        except LookupError:
            raise ValueError("systemd has not passed this socket: start the role by its .socket unit") from None
    if "backlog" not in named and len(arguments) <= _BEFORE_BACKLOG.get(kind, -1):
        description += f":backlog={_BACKLOG}"
    if kind != "ssl":
        return serverFromString(reactor, description)
    if "trustRoots" not in named:
        return _TLSEndpoint(reactor, description, lambda each: serverFromString(each, description))
    ours = _by_name(kind, _SSL, arguments, named, "trustRoots")
    return _TLSEndpoint(reactor, description, lambda each: _mutual(each, ours))


def _take_apart(description: str) -> tuple[str, list[str], dict[str, str]]:
    """Split a string as Twisted does: a backslash quotes the character after it."""
    pieces = _ARGUMENT.findall(description)
    if len(":".join(pieces)) != len(description):
        raise ValueError("a backslash stands at the end, where it has nothing to quote")
    alone, named = [], {}
    for piece in pieces:
        if pair := _NAMED.fullmatch(piece):
            named[_unquoted(pair[1])] = _unquoted(pair[2])
        else:
            alone.append(_unquoted(piece))
    return (alone or [""])[0], alone[1:], named


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


def _by_name(kind: str, names: tuple[str, ...], alone: list[str], named: dict[str, str], *more: str) -> dict[str, str]:
    """Return the arguments by their names."""
    for name in named:
        if name not in (*names, *more):
            raise ValueError(f"{kind}: takes no argument {name!r}, but {', '.join((*names, *more))}")
    if len(alone) > len(names) or named.keys() & set(names[: len(alone)]):
        raise ValueError(f"{kind}: is given an argument twice, or too many")
    found = {**dict(zip(names, alone, strict=False)), **named}
    for name in (names[0], *found):
        # An empty path would mean the working directory.
        if not found.get(name) and name != "interface":
            raise ValueError(f"{kind}: has no {name}")
    return found


def _number(arguments: dict[str, str], name: str, default: str, most: int, base: int = 10) -> int:
    text = arguments.get(name, default)
    with suppress(ValueError):
        number = int(text, base)
        if 0 <= number <= most:
            return number
    raise ValueError(f"{name} {text!r} is no number between 0 and {most:{'o' if base == 8 else 'd'}}")


def client_endpoint(reactor: Any, description: str) -> Any:
    """Parse the endpoint string of a client. A TLS endpoint reads its files for every connection.

    :returns: an ``IStreamClientEndpoint``.
    :raises Exception: an error of any kind.
    """
    endpoint = clientFromString(reactor, description)
    is_tls = description.partition(":")[0] in ("tls", "ssl")
    return _TLSClient(reactor, description, endpoint) if is_tls else endpoint


class _Reading:
    """An endpoint whose files are read again. While they cannot be read, the files read before stay in force."""

    log = Logger()

    def __init__(self, described: str) -> None:
        self._described = described
        self._complaint = ""

    def _read(self) -> Any:
        """Read the files, and keep their content."""
        raise NotImplementedError

    def reread(self) -> None:
        """Read the files again, and log an error once. Blocks."""
        complaint = ""
        try:
            self._read()
        except Exception as error:  # OpenSSL's and Twisted's errors have no common root
            complaint = one_line(error)
            if complaint != self._complaint:
                self.log.error(
                    "the certificates of {endpoint} cannot be read: {why}; those read before stay in force",
                    endpoint=self._described,
                    why=complaint,
                )
        self._complaint = complaint

    def _check_dates(self, certificate: Any) -> None:
        """Log an error if the endpoint's own certificate is not valid now: the peer will refuse it.

        :param certificate: an object of pyOpenSSL.
        """
        why = why_invalid([certificate.to_cryptography()], datetime.now(timezone.utc))
        if why:
            self.log.error(
                "{endpoint}: {why}: set the clock right, or renew the certificate with s2s certs make --renew",
                endpoint=self._described,
                why=why,
            )


@implementer(IStreamServerEndpoint)
class _TLSEndpoint(_Reading):
    """A server's endpoint that uses the certificates read last for each new connection.

    :param make: creates an ``SSL4ServerEndpoint`` from the files.
    """

    def __init__(self, reactor: Any, described: str, make: Callable[[Any], Any]) -> None:
        super().__init__(described)
        self._reactor = reactor
        self._make = make
        self._port, self._options = self._read()

    def listen(self, factory: IProtocolFactory) -> Deferred[IListeningPort]:
        """Listen."""
        contexts: Any = self  # Twisted also takes an object with the method getContext alone
        tls = TLSMemoryBIOFactory(contexts, False, factory, self._reactor)
        counters = getattr(factory, "counters", None) or Counters()
        gate = HandshakeGate(tls, self._described, Clock(self._reactor), counters)
        options = {name: value for name, value in self._options.items() if name != "contextFactory"}
        listening: Deferred[IListeningPort] = execute(self._reactor.listenTCP, self._port, gate, **options)
        return listening

    def getContext(self) -> Any:
        """Return the TLS context of a connection."""
        return self._options["contextFactory"].getContext()

    def _read(self) -> Any:
        made: list[tuple[int, dict[str, Any]]] = []
        self._make(_Recorder(lambda port, _, **options: made.append((port, options)))).listen(Factory())
        [(port, options)] = made
        # Create a context now, and not at the first connection: OpenSSL refuses keys that are too small or not of the
        # certificate.
        options["contextFactory"].getContext()
        self._check_dates(options["contextFactory"].certificate)
        self._options = options
        return port, options


class _Recorder:
    """A substitute for the reactor that records the call by which an endpoint would listen."""

    def __init__(self, listenSSL: Callable[..., object]) -> None:
        self.listenSSL = listenSSL


@implementer(IStreamClientEndpoint)
class _TLSClient(_Reading):
    """A client's endpoint that reads its files for every connection: the last one may have failed because of them."""

    def __init__(self, reactor: Any, described: str, endpoint: Any) -> None:
        super().__init__(described)
        self._reactor = reactor
        self._endpoint = endpoint
        #: The content of the certificate file when its dates were checked last.
        self._checked = b""

    def connect(self, factory: IProtocolFactory) -> Deferred[Any]:
        """Connect."""
        reading = own_threads.run(self._reactor, self.reread)
        connecting: Deferred[Any] = reading.addCallback(lambda _: self._endpoint.connect(factory))
        return connecting

    def _read(self) -> Any:
        self._endpoint = clientFromString(self._reactor, self._described)
        _, _, named = _take_apart(self._described)
        path = named.get("certificate") or named.get("certKey")
        if path and (content := _read(Path(path))) != self._checked:
            self._checked = content
            self._check_dates(_certificates(Path(path))[0].original)


# --- haproxy: --------------------------------------------------------------------------------------------------------


class _Proxied(HAProxyProtocolWrapper):
    """A connection that begins with a PROXY header. Twisted closes any other connection without a log line."""

    factory: _ProxiedFactory

    def dataReceived(self, data: bytes) -> None:
        """Process received bytes."""
        super().dataReceived(data)
        # "PROXY UNKNOWN" is not logged: Twisted refuses this header, but HAProxy's own checks of the port send it.
        if self._proxyInfo is None and self.disconnecting and not data.startswith(b"PROXY UNKNOWN\r\n"):
            self.factory.tell(self.getPeer())


class _ProxiedFactory(HAProxyWrappingFactory):
    """Creates the connections, and logs those without a header: the first one, then one line a minute."""

    log = Logger()
    protocol = _Proxied  # type: ignore[assignment]
    noisy = False

    def __init__(self, reactor: Any, factory: Any) -> None:
        super().__init__(factory)  # type: ignore[no-untyped-call]
        self.counters = getattr(factory, "counters", None)
        self._lines = LineQuota(reactor, lambda untold: self._say(f"{sum(untold.values())} more connections"), most=1)

    def tell(self, peer: Any) -> None:
        if self._lines.may_tell("without a header"):
            self._say(f"a connection from {getattr(peer, 'host', 'a local socket')}")

    def _say(self, which: str) -> None:
        self.log.warn(
            "{which} without a PROXY header ended: set send-proxy at the proxy, or listen without haproxy:", which=which
        )


@implementer(IStreamServerEndpoint)
class _ProxiedEndpoint:
    """An endpoint behind a proxy that sends the addresses of the peers."""

    def __init__(self, reactor: Any, behind: Any) -> None:
        self._reactor = reactor
        self._behind = behind
        if hasattr(behind, "reread"):
            self.reread = behind.reread

    def listen(self, factory: IProtocolFactory) -> Deferred[IListeningPort]:
        """Listen."""
        listening: Deferred[IListeningPort] = self._behind.listen(_ProxiedFactory(self._reactor, factory))
        return listening


# --- unix: -----------------------------------------------------------------------------------------------------------


@implementer(IStreamServerEndpoint)
class _LockedEndpoint:
    """A UNIX socket that only one process may have. Its lock ends with the process, however the process ends."""

    def __init__(self, path: str, endpoint: UNIXServerEndpoint) -> None:
        self._path = path
        self._endpoint = endpoint

    def listen(self, factory: IProtocolFactory) -> Deferred[IListeningPort]:
        """Listen, and replace the socket that a killed server left behind."""
        return maybeDeferred(self._listen, factory)

    def _listen(self, factory: IProtocolFactory) -> Deferred[IListeningPort]:
        # The lock file is never removed: after its removal another process could lock a new file of the same name.
        lock = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ValueError("another server listens there") from None
        # Remove only a socket, since a mistyped path may be any file.
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(self._path).st_mode):
                os.remove(self._path)
        listening: Deferred[IListeningPort] = self._endpoint.listen(factory)
        return listening


def _unix(reactor: Any, arguments: dict[str, str]) -> Any:
    path = arguments["address"]
    endpoint = UNIXServerEndpoint(
        reactor,
        path,
        backlog=_number(arguments, "backlog", str(_BACKLOG), 65535),
        mode=_number(arguments, "mode", "666", 0o777, base=8),
        wantPID=0,
    )
    is_locked = _number(arguments, "lockfile", "1", 1)
    return _LockedEndpoint(path, endpoint) if is_locked else endpoint


# --- ssl: with trustRoots --------------------------------------------------------------------------------------------


def _mutual(reactor: Any, arguments: dict[str, str]) -> Any:
    for name in _ONLY_ONE_WAY:
        if name in arguments:
            raise ValueError(f"ssl: takes {name} only without trustRoots, and TLS 1.2 and 1.3 need none")
    key_path = arguments.get("privateKey", "server.pem")
    chain_path = arguments.get("extraCertChain")
    own = _own_certificate(arguments.get("certKey", key_path), key_path)
    roots = _roots(Path(arguments["trustRoots"]))
    options = ssl.CertificateOptions(
        privateKey=own.privateKey.original,
        certificate=own.original,
        extraCertChain=[each.original for each in _certificates(Path(chain_path))] if chain_path else None,
        trustRoot=ssl.trustRootFromCertificates(roots),
        raiseMinimumTo=ssl.TLSVersion.TLSv1_2,
    )
    # Create a context now, since OpenSSL refuses keys that are too small.
    _judged(options.getContext, f"{key_path} cannot be used")
    return SSL4ServerEndpoint(
        reactor,
        _number(arguments, "port", "", 65535),
        options,
        backlog=_number(arguments, "backlog", str(_BACKLOG), 65535),
        interface=arguments.get("interface", ""),
    )


def _own_certificate(certificate_path: str, key_path: str) -> ssl.PrivateCertificate:
    key = _read(Path(key_path))
    if b"ENCRYPTED" in key:  # OpenSSL would ask for the passphrase on the terminal
        raise ValueError(f"the key in {key_path} has a passphrase: give one without")
    certificate = _certificates(Path(certificate_path))[0]
    own: ssl.PrivateCertificate = _judged(
        ssl.PrivateCertificate.loadPEM, f"{key_path} has no key of {certificate_path}", certificate.dumpPEM() + key
    )
    return own


def _roots(path: Path) -> list[ssl.Certificate]:
    """Read the roots from one file, or from every ``.pem`` file of a directory."""
    files: Iterable[Path] = [path]
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.suffix.lower() == ".pem")
        if not files:
            raise ValueError(f"the directory {path} has no file whose name ends in .pem")
    return [certificate for file in files for certificate in _certificates(file)]


def _certificates(path: Path) -> list[ssl.Certificate]:
    found = [
        _judged(ssl.Certificate.loadPEM, f"{path} has a broken certificate", pem) for pem in _PEM.findall(_read(path))
    ]
    if not found:
        raise ValueError(f"{path} has no certificate in PEM format")
    return found


def _read(path: Path) -> bytes:
    try:
        return files.read(path, _MOST_BYTES)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _judged(load: Callable[..., T], otherwise: str, *arguments: Any) -> T:
    """Load something with OpenSSL.

    :raises ValueError: with the text ``otherwise``, since OpenSSL's errors have no common base class and are hard to
        understand without its sources.
    """
    try:
        return load(*arguments)
    except Exception:
        raise ValueError(otherwise) from None
