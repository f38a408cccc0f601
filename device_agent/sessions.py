"""TLS sessions kept across restarts: secrets, each good for one credential only."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from typing import TYPE_CHECKING, Final

from device_agent import files
from provisioning.tls.context import ClientCertificate, ClientPsk

if TYPE_CHECKING:
    from pathlib import Path

    from device_agent.address import Endpoint

LARGEST_SESSION: Final = 16 * 1024
_MOST: Final = 4


def tag_of(credential: ClientCertificate | ClientPsk) -> str:
    """What names a credential beside its sessions, and tells nothing about it."""
    match credential:
        case ClientCertificate(chain_pem=chain):
            return hashlib.sha256(b"certificate\0" + chain).hexdigest()
        case ClientPsk(identity=identity):
            return hashlib.sha256(b"psk\0" + identity.encode()).hexdigest()


class Sessions:
    """The newest session for each endpoint.

    A session carries the identity it was made with: offered beside another credential
    it would make this device its own predecessor. So the file names the credential.
    """

    def __init__(self, path: Path, disk: files.Disk) -> None:
        self._path = path
        self._disk = disk
        self._tag = ""
        self._kept: dict[str, bytes] = {}
        self._read()

    def take(self, endpoint: Endpoint, tag: str) -> bytes | None:
        """The session to offer, once: tickets of TLS 1.3 are for one use (C.4)."""
        return self._kept.pop(str(endpoint), None) if tag == self._tag else None

    def put(self, endpoint: Endpoint, tag: str, session: bytes | None) -> None:
        """Keep the session of a connection. Raises OSError."""
        if session is None or len(session) > LARGEST_SESSION:
            return
        if tag != self._tag:
            self._tag = tag
            self._kept = {}
        if self._kept.get(str(endpoint)) == session:
            return
        self._kept.pop(str(endpoint), None)
        self._kept[str(endpoint)] = session
        while len(self._kept) > _MOST:
            del self._kept[next(iter(self._kept))]
        self._write()

    def _write(self) -> None:
        encoded = {
            name: base64.b64encode(octets).decode()
            for name, octets in self._kept.items()
        }
        document = json.dumps({"credential": self._tag, "sessions": encoded})
        self._disk.write_atomically(self._path, document.encode())

    def _read(self) -> None:
        content = files.read_private(self._path)
        if content is None:
            return
        try:
            document = json.loads(content)
            self._tag = str(document["credential"])
            self._kept = {
                str(name): base64.b64decode(octets, validate=True)
                for name, octets in document["sessions"].items()
            }
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
            binascii.Error,
        ):
            # Damaged: the next handshake is a full one, and replaces it.
            self._tag, self._kept = "", {}
