"""TLS sessions as bytes: read what they say, and make one for an external PSK.

The form is OpenSSL's `SSL_SESSION_ASN1`, which `i2d_SSL_SESSION` writes: it is how a
session outlives its process, and the only place where the bindings let us put the PSK
identity so that every later ticket carries it.
"""

from __future__ import annotations

from dataclasses import dataclass

_TIME, _TIMEOUT, _PSK_IDENTITY, _LIFETIME_HINT, _TICKET = 1, 2, 8, 9, 10
MAX_SESSION = 16_384
"""Octets of a serialised session that are read."""


@dataclass(frozen=True, slots=True)
class SessionFacts:
    """What a serialised session says.

    created: seconds since 1970. lifetime_s: its own time-out. psk_identity: set for
    sessions that a PSK began. has_ticket: false where nothing can be resumed.
    """

    version: int
    created: int
    lifetime_s: int
    psk_identity: bytes | None
    has_ticket: bool


def _length(data: bytes, at: int) -> tuple[int, int]:
    first = data[at]
    if first < 0x80:  # noqa: PLR2004 - DER's short form
        return first, at + 1
    octets = first & 0x7F
    return int.from_bytes(data[at + 1 : at + 1 + octets]), at + 1 + octets


def _elements(data: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at < len(data):
        tag = data[at]
        length, start = _length(data, at + 1)
        found.append((tag, data[start : start + length]))
        at = start + length
    return found


def read_session(der: bytes) -> SessionFacts | None:
    """What a session from `i2d_SSL_SESSION` says; None for anything else."""
    if not der or len(der) > MAX_SESSION or der[0] != 0x30:  # noqa: PLR2004 - SEQUENCE
        return None
    try:
        length, start = _length(der, 1)
        parts = _elements(der[start : start + length])
        version = int.from_bytes(parts[1][1])
        tagged = {tag & 0x1F: body for tag, body in parts if tag & 0xE0 == 0xA0}  # noqa: PLR2004 - context tags
        inner = {kind: _elements(body)[0][1] for kind, body in tagged.items() if body}
    except IndexError:
        return None
    return SessionFacts(
        version=version,
        created=int.from_bytes(inner.get(_TIME, b"")),
        lifetime_s=int.from_bytes(inner.get(_TIMEOUT, b"")),
        psk_identity=inner.get(_PSK_IDENTITY),
        has_ticket=_TICKET in inner,
    )


def _der(tag: int, body: bytes) -> bytes:
    size = len(body)
    if size < 0x80:  # noqa: PLR2004 - DER's short form
        return bytes((tag, size)) + body
    octets = (size.bit_length() + 7) // 8
    return bytes((tag, 0x80 | octets)) + size.to_bytes(octets) + body


def _integer(number: int) -> bytes:
    return _der(2, number.to_bytes(number.bit_length() // 8 + 1))


def external_psk_session(identity: bytes, key: bytes, created: int) -> bytes:
    """A TLS 1.3 session whose secret is an external PSK (RFC 8446, 4.2.11).

    SHA-256 only (RFC 9257: one hash a key), which TLS_AES_128_GCM_SHA256 stands for.
    The identity is in it, so that whoever resumes a ticket of it is known by name.
    created: seconds since 1970.
    """
    return _der(
        0x30,
        b"".join(
            (
                _integer(1),
                _integer(0x0304),
                _der(4, b"\x13\x01"),
                _der(4, b""),
                _der(4, key),
                _der(0xA0 | _TIME, _integer(created)),
                _der(0xA0 | _TIMEOUT, _integer(7200)),
                _der(0xA0 | _PSK_IDENTITY, _der(4, identity)),
            )
        ),
    )
