"""Addresses of the gateway: parsed or refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from typing_extensions import override

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_\-]{0,62})"
_NAME = rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*\.?"
_HOST = re.compile(rf"{_NAME}|[0-9A-Fa-f]*:[0-9A-Fa-f:.]+")
LARGEST_PORT: Final = 65535
DEFAULT_PORTS: Final = {"https": 443, "mqtts": 8883}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to connect. host: a name, or an IP address without brackets."""

    host: str
    port: int

    @override
    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_endpoint(url: str, scheme: str) -> Endpoint:
    """The endpoint of `SCHEME://HOST[:PORT][/]`; nothing else may stand in it.

    Raises ValueError with a reason fit for whoever typed it.
    """
    parts = urlsplit(url)
    if parts.scheme.lower() != scheme:
        raise ValueError(f"it must begin with {scheme}://")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a user name or password has no place in it")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("only the host and the port belong in it")
    host = parts.hostname or ""
    if _HOST.fullmatch(host) is None:
        raise ValueError("it names no host")
    port = parts.port if parts.port is not None else DEFAULT_PORTS[scheme]
    if not 0 < port <= LARGEST_PORT:
        raise ValueError("it has no such port")
    return Endpoint(host, port)
