"""Reads the PSK identity in the bytes, before OpenSSL sees them, and what was chosen.

OpenSSL's PSK callbacks are synchronous, the keys are behind an HSM: so the identity is
read where it stands in clear (TLS 1.3: `pre_shared_key` of the ClientHello, RFC 8446,
4.2.11; TLS 1.2: ClientKeyExchange, RFC 4279) and the bytes wait until the key is here.
What does not parse is left to OpenSSL, which has the alert for it: nothing is refused
here, and nothing is believed.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_FLIGHT = 32_768
"""Octets of clear handshake kept at most; longer hellos get no PSK."""

MAX_IDENTITIES = 4
"""PSK identities of one ClientHello that a key is fetched for."""

_CHANGE_CIPHER_SPEC, _HANDSHAKE = 20, 22
_CLIENT_HELLO, _SERVER_HELLO, _CLIENT_KEY_EXCHANGE = 1, 2, 16
_PRE_SHARED_KEY, _SUPPORTED_VERSIONS = 41, 43
TLS13 = 0x0304
_RETRY_RANDOM = bytes.fromhex(
    "cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c"
)


@dataclass(frozen=True, slots=True)
class ServerChoice:
    """What the ServerHello says: version, suite, and which offered PSK was taken."""

    version: int
    suite: int
    selected_psk: int | None
    retry: bool


class ClearFlight:
    """Handshake messages in clear, put together over records and TCP segments."""

    __slots__ = ("_messages", "_records", "over")

    def __init__(self) -> None:
        self._records = bytearray()
        self._messages = bytearray()
        self.over = False
        """True once nothing more is to be read: encrypted, too long or nonsense."""

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Whole handshake messages (type, body) that `data` completes."""
        if self.over:
            return []
        if not self._records and not self._messages and (one := _only_message(data)):
            return [one]
        self._records += data
        while len(self._records) >= 5:  # noqa: PLR2004 - a record header
            kind, length = self._records[0], int.from_bytes(self._records[3:5])
            if kind not in (_HANDSHAKE, _CHANGE_CIPHER_SPEC):
                # What is whole is still given below.
                self.over = True
                break
            if len(self._records) < 5 + length:
                break
            # TLS 1.3 puts an empty ChangeCipherSpec between HelloRetryRequest and the
            # second hello (RFC 8446, D.4), so clear messages may still follow one.
            if kind == _HANDSHAKE:
                self._messages += self._records[5 : 5 + length]
            del self._records[: 5 + length]
        found = self._whole()
        self.over |= len(self._records) + len(self._messages) > MAX_FLIGHT
        if self.over:
            self._records.clear()
            self._messages.clear()
        return found

    def _whole(self) -> list[tuple[int, bytes]]:
        found = []
        while len(self._messages) >= 4:  # noqa: PLR2004 - a message header
            length = int.from_bytes(self._messages[1:4])
            if len(self._messages) < 4 + length:
                break
            found.append((self._messages[0], bytes(self._messages[4 : 4 + length])))
            del self._messages[: 4 + length]
        return found


def _only_message(data: bytes) -> tuple[int, bytes] | None:
    """The message of a first record that holds just one, as nearly every one does.

    What stands after it in a server's flight is encrypted and of no interest; after a
    client's there is nothing, or the general way is taken.
    """
    if len(data) < 9 or data[0] != _HANDSHAKE:  # noqa: PLR2004 - both headers
        return None
    length = int.from_bytes(data[3:5])
    if int.from_bytes(data[6:9]) != length - 4:
        return None
    kind, end = data[5], 5 + length
    if len(data) == end or (len(data) > end and kind == _SERVER_HELLO):
        return kind, data[9:end]
    return None


class _Reader:
    """A cursor over octets; raises IndexError past the end."""

    __slots__ = ("at", "data")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise IndexError
        piece = self.data[self.at : end]
        self.at = end
        return piece

    def number(self, octets: int) -> int:
        return int.from_bytes(self.take(octets))

    def vector(self, octets: int) -> bytes:
        return self.take(self.number(octets))

    @property
    def left(self) -> int:
        return len(self.data) - self.at


def _extensions(reader: _Reader) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    if reader.left:
        block = _Reader(reader.vector(2))
        while block.left:
            kind = block.number(2)
            found[kind] = block.vector(2)
    return found


def offered_identities(client_hello: bytes) -> list[bytes]:
    """Every identity of `pre_shared_key`, tickets included; none if it does not parse.

    client_hello: the body, without the four octets of the message header.
    """
    if b"\x00\x29" not in client_hello:
        return []  # the extension's number is not even in it
    try:
        reader = _Reader(client_hello)
        reader.take(34)
        reader.vector(1)
        reader.vector(2)
        reader.vector(1)
        offer = _extensions(reader).get(_PRE_SHARED_KEY)
        if offer is None:
            return []
        found = []
        identities = _Reader(_Reader(offer).vector(2))
        while identities.left:
            found.append(identities.vector(2))
            identities.take(4)
    except IndexError:
        return []
    return found


def key_exchange_identity(client_key_exchange: bytes) -> bytes | None:
    """The PSK identity with which every PSK ClientKeyExchange of TLS 1.2 begins."""
    try:
        return _Reader(client_key_exchange).vector(2)
    except IndexError:
        return None


def server_choice(server_hello: bytes) -> ServerChoice | None:
    """What a ServerHello chose; None if it does not parse."""
    try:
        reader = _Reader(server_hello)
        version = reader.number(2)
        retry = reader.take(32) == _RETRY_RANDOM
        reader.vector(1)
        suite = reader.number(2)
        reader.take(1)
        extensions = _extensions(reader)
    except IndexError:
        return None
    told = extensions.get(_SUPPORTED_VERSIONS)
    chosen = extensions.get(_PRE_SHARED_KEY)
    return ServerChoice(
        int.from_bytes(told) if told else version,
        suite,
        int.from_bytes(chosen) if chosen else None,
        retry,
    )


def client_messages(
    messages: list[tuple[int, bytes]], choice: ServerChoice | None
) -> list[bytes]:
    """PSK identities that the next bytes will make OpenSSL ask for.

    choice: what our ServerHello chose, once it is out; a ClientKeyExchange without PSK
    begins with a key share, so it is read only where the suite has a PSK.
    """
    found: list[bytes] = []
    for kind, body in messages:
        if kind == _CLIENT_HELLO:
            found += offered_identities(body)
        elif kind == _CLIENT_KEY_EXCHANGE and choice and choice.suite in PSK_SUITES:
            identity = key_exchange_identity(body)
            found += [identity] if identity is not None else []
    return found


def identity_to_come(choice: ServerChoice) -> bool:
    """Whether the client has still to name its PSK after this ServerHello."""
    return choice.suite in PSK_SUITES


def server_messages(messages: list[tuple[int, bytes]]) -> ServerChoice | None:
    """The choice of the last ServerHello that is no HelloRetryRequest."""
    for kind, body in reversed(messages):
        if kind == _SERVER_HELLO:
            choice = server_choice(body)
            if choice and not choice.retry:
                return choice
    return None


PSK_SUITES = frozenset(
    {
        *range(0x008A, 0x0096),  # RFC 4279
        *range(0x00A8, 0x00BA),  # RFC 5487
        *range(0xC033, 0xC03C),  # RFC 5489
        *range(0xC0A4, 0xC0AC),  # RFC 6655
        *range(0xCCAB, 0xCCAF),  # RFC 7905
        *range(0xD001, 0xD006),  # RFC 8442
    }
)
"""Suites of TLS 1.2 whose ClientKeyExchange carries a PSK identity."""
