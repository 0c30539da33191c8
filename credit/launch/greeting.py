"""How two processes that share a secret find out that they do, over a connection on which anybody may call.

The host sends a nonce; the visitor answers with its own and what it has to say, sealed (HMAC) under the secret and both
nonces; the host's answers are sealed in the same way. So each proves that it knows the secret, to this peer and now:
what was recorded is of no use. Nothing is parsed before its seal is checked, and messages are bounded. No torch.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
import time
from typing import Any

NONCE, SEAL = 32, 32
"""Bytes of each."""
LONGEST_ARRIVAL, LONGEST_ANSWER = 2048, 1 << 16
"""Bytes of a visitor's message, and of a host's."""
GREETING_S = 5.0
"""How long either side has to prove itself."""


class Visitor:
    """At the host: a connection that may be anybody's, until `hear` has returned something."""

    def __init__(self, connection: socket.socket, secret: bytes) -> None:
        connection.setblocking(False)
        self.connection, self.deadline = connection, time.monotonic() + GREETING_S
        self._secret, self._nonce, self._heard, self._sent = secret, os.urandom(NONCE), bytearray(), 0
        self._key = b""
        connection.send(self._nonce)

    def hear(self) -> Any:
        """What it says, once that has come whole; None before.

        Raises:
            ValueError: if it does not know the secret, says too much, or has left.
            OSError: if the connection is lost.
        """
        most = NONCE + SEAL + 4 + LONGEST_ARRIVAL
        data = self.connection.recv(most + 1 - len(self._heard))
        self._heard += data
        length = int.from_bytes(self._heard[NONCE + SEAL : NONCE + SEAL + 4], "big")
        have = len(self._heard) - NONCE - SEAL - 4
        if length > LONGEST_ARRIVAL or have > max(length, 0):
            raise ValueError("says too much")
        if have < length or have < 0:
            if not data:
                raise ValueError("left")
            return None
        self._key = _key(self._secret, self._nonce, bytes(self._heard[:NONCE]))
        return _unsealed(self._key, b"visitor", 0, bytes(self._heard[NONCE:]))

    def tell(self, message: dict[str, Any]) -> None:
        """Answer one who has proved itself.

        Raises:
            OSError: if it has left.
        """
        self.connection.settimeout(GREETING_S)
        self.connection.sendall(_sealed(self._key, b"host", self._sent, message))
        self._sent += 1


class Visit:
    """At the visitor: a connection to what may be the host.

    Raises:
        ValueError: if it does not prove in time that it knows the secret.
        OSError: if there is nobody, or the connection is lost.
    """

    def __init__(self, connection: socket.socket, secret: bytes, message: Any) -> None:
        self.connection, self._heard = connection, 0
        deadline = time.monotonic() + GREETING_S
        theirs, mine = _read(connection, NONCE, deadline), os.urandom(NONCE)
        self._key = _key(secret, theirs, mine)
        connection.sendall(mine + _sealed(self._key, b"visitor", 0, message))
        self.hear(deadline)

    def hear(self, deadline: float) -> Any:
        """The host's next message, its first a mere sign that it is the host."""
        head = _read(self.connection, SEAL + 4, deadline)
        length = int.from_bytes(head[SEAL:], "big")
        if length > LONGEST_ANSWER:
            raise ValueError("says too much")
        self._heard += 1
        return _unsealed(self._key, b"host", self._heard - 1, head + _read(self.connection, length, deadline))


def _key(secret: bytes, host: bytes, visitor: bytes) -> bytes:
    return hmac.digest(secret, b"credit" + host + visitor, hashlib.sha256)


def _seal(key: bytes, who: bytes, number: int, payload: bytes) -> bytes:
    return hmac.digest(key, b"%s %d " % (who, number) + payload, hashlib.sha256)


def _sealed(key: bytes, who: bytes, number: int, message: Any) -> bytes:
    payload = json.dumps(message).encode()
    return _seal(key, who, number, payload) + len(payload).to_bytes(4, "big") + payload


def _unsealed(key: bytes, who: bytes, number: int, frame: bytes) -> Any:
    payload = frame[SEAL + 4 :]
    if not hmac.compare_digest(frame[:SEAL], _seal(key, who, number, payload)):
        raise ValueError("does not know the secret")
    return json.loads(payload)


def _read(connection: socket.socket, size: int, deadline: float) -> bytes:
    """So many bytes, however slowly they come."""
    data = bytearray()
    while len(data) < size:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        part = connection.recv(size - len(data))
        if not part:
            raise ValueError("left")
        data += part
    return bytes(data)
