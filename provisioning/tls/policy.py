"""TLS versions, suites and groups as data: the named policies (RFC 9325, BCP 195)."""

from __future__ import annotations

from dataclasses import dataclass, replace

FFDHE2048 = b"""-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""
"""The group of RFC 7919, A.1: for DHE-PSK with those that have no curves."""


@dataclass(frozen=True, slots=True)
class TlsPolicy:
    """What a context offers and accepts.

    suites12, suites13, groups: OpenSSL's names, in order of preference.
    ticket_lifetime_s: how long a session may be resumed, at most a week.
    """

    name: str
    suites12: tuple[str, ...]
    suites13: tuple[str, ...]
    groups: tuple[str, ...]
    ticket_lifetime_s: int = 24 * 3600


_CERTIFICATE_12 = (
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-AES128-CCM",
)
# RFC 9325 wants AEAD; the one CBC suite is what mbedTLS 2.28 and gnutls share with us
# for ECDHE-PSK besides ChaCha20, and it still has forward secrecy.
_PSK_12 = (
    "ECDHE-PSK-CHACHA20-POLY1305",
    "ECDHE-PSK-AES128-CBC-SHA256",
    "DHE-PSK-AES128-GCM-SHA256",
    "DHE-PSK-CHACHA20-POLY1305",
    "DHE-PSK-AES128-CCM",
)
_PLAIN_PSK_12 = ("PSK-AES128-GCM-SHA256", "PSK-AES128-CCM")

MODERN = TlsPolicy(
    name="modern",
    suites12=_CERTIFICATE_12 + _PSK_12,
    # SHA-256 first: an external PSK is bound to that hash (RFC 8446, 4.2.11).
    suites13=(
        "TLS_AES_128_GCM_SHA256",
        "TLS_CHACHA20_POLY1305_SHA256",
        "TLS_AES_256_GCM_SHA384",
    ),
    groups=("X25519MLKEM768", "X25519", "P-256", "P-384"),
)
"""The default: forward secrecy always, certificates and PSK side by side."""

PLAIN_PSK = replace(MODERN, name="plain-psk", suites12=MODERN.suites12 + _PLAIN_PSK_12)
"""For devices that can do no key exchange at all; only where a profile allows it."""

PSK_CLIENT = replace(
    MODERN,
    name="psk-client",
    suites12=_PSK_12,
    suites13=("TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256"),
)
"""What a client with a PSK offers: only what its key can be used with."""

POLICIES: dict[str, TlsPolicy] = {policy.name: policy for policy in (MODERN, PLAIN_PSK)}
"""The policies that a configuration can name."""
