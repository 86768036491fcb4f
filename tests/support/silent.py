"""A PostgreSQL that lets a client in and then says nothing, as a pooler does that has no session free."""

from __future__ import annotations

import socket
import struct
import threading

_SETTINGS = {
    "server_version": "16.0",
    "client_encoding": "UTF8",
    "server_encoding": "UTF8",
    "DateStyle": "ISO, MDY",
    "standard_conforming_strings": "on",
    "integer_datetimes": "on",
}


class SilentDatabase:
    """Listens on the loopback until it is closed.

    :param is_letting_in: whether it ends the handshake; else it says nothing at all.
    """

    def __init__(self, *, is_letting_in: bool) -> None:
        self._is_letting_in = is_letting_in
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Its URL; no connect timeout of ours ends the wait."""
        port = self._listener.getsockname()[1]
        return f"postgresql://u:hunter2@127.0.0.1:{port}/d?sslmode=disable&gssencmode=disable&connect_timeout=600"

    def close(self) -> None:
        """Close it, with its connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for each in self._open:
            each.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(client)
            if self._is_letting_in:
                client.recv(4096)
                settings = b"".join(
                    _message(b"S", name.encode() + b"\0" + value.encode() + b"\0") for name, value in _SETTINGS.items()
                )
                client.sendall(
                    _message(b"R", struct.pack("!I", 0))
                    + settings
                    + _message(b"K", struct.pack("!II", 1, 1))
                    + _message(b"Z", b"I")
                )


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body
