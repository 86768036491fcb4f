"""Clients that send the same request at once, each on a connection of its own."""

from __future__ import annotations

import selectors
import socket
from collections import Counter
from urllib.parse import urlsplit

from s2s.roles import descriptors


class ConcurrentClients:
    """Sockets that send the same request, and their answers.

    :param size: number of clients.
    """

    def __init__(self, url: str, token: str, path: str, size: int) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None and parts.port is not None
        self._request = (
            f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
        ).encode()
        descriptors.allow()
        self._selector = selectors.DefaultSelector()
        self._got: dict[socket.socket, bytes] = {}
        for _ in range(size):
            one = socket.create_connection((parts.hostname, parts.port))
            self._got[one] = b""
            self._selector.register(one, selectors.EVENT_READ)

    def send(self) -> None:
        """Send the request on every socket."""
        for one in self._got:
            one.sendall(self._request)

    def answered(self) -> int:
        """Read the available bytes, and return the number of clients whose answer is complete."""
        while ready := self._selector.select(0):
            for key, _ in ready:
                one = key.fileobj
                assert isinstance(one, socket.socket)
                chunk = one.recv(65536)
                self._got[one] += chunk
                if not chunk:
                    self._selector.unregister(one)
            if not self._selector.get_map():
                break
        return len(self._got) - len(self._selector.get_map())

    def statuses(self) -> dict[int, int]:
        """Count the answers by status."""
        return dict(Counter(int(got.split(b" ", 2)[1]) for got in self._got.values()))

    def close(self) -> None:
        """Close every socket."""
        for one in self._got:
            one.close()
        self._selector.close()
