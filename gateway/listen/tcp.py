"""TCP sockets: bound as configured, IPv4 and IPv6, one port for all of a listener."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import TYPE_CHECKING

from provisioning.model.errors import Unusable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BACKLOG = 1024


def bind(name: str, hosts: Sequence[str], port: int) -> list[socket.socket]:
    """Listening sockets, one for each host, all on the same port.

    port: 0 takes a free one, the same for all. Raises Unusable with what to do.
    A machine without IPv6 is served by its IPv4 addresses.
    """
    made: list[socket.socket] = []
    try:
        for host in hosts:
            family = _family(host)
            if family == socket.AF_INET6 and not _has_ipv6():
                continue
            listening = socket.socket(family, socket.SOCK_STREAM)
            made.append(listening)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Accepted sockets inherit it: a peer that lost its network is noticed.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 120)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 30)
            if family == socket.AF_INET6:
                # Else "::" would take the IPv4 port, and "0.0.0.0" beside it fails.
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind((host, port))
            port = port or listening.getsockname()[1]
            listening.listen(BACKLOG)
            listening.setblocking(False)
    except OSError as error:
        for one in made:
            one.close()
        raise Unusable(
            f"listener {name}",
            f"port {port} cannot be taken: {error.strerror}; end what holds it, or "
            f"change listen.{name}.port in birthmark.toml",
        ) from error
    if not made:
        raise Unusable(f"listener {name}", "none of its addresses exists here")
    return made


def _family(host: str) -> socket.AddressFamily:
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return socket.AF_INET
    return socket.AF_INET6 if version == 6 else socket.AF_INET  # noqa: PLR2004 - IPv6


def _has_ipv6() -> bool:
    if not socket.has_ipv6:
        return False
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def free_port(taken: set[int]) -> int:
    """A port that is free at the moment on all addresses, and not in `taken`."""
    for _ in range(100):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        if port not in taken:
            taken.add(port)
            return port
    raise Unusable("this machine", "it has no free port")


async def serve(
    sockets: Sequence[socket.socket], factory: Callable[[], asyncio.Protocol]
) -> list[asyncio.Server]:
    """Accept on every socket; `factory` makes the protocol of each connection."""
    loop = asyncio.get_running_loop()
    return [
        await loop.create_server(factory, sock=one, backlog=BACKLOG) for one in sockets
    ]
