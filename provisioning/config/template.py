"""The file that `init` writes: what was chosen, and each default as a comment."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from provisioning.config.sections import PORTS

if TYPE_CHECKING:
    from collections.abc import Mapping


def default_toml(  # noqa: PLR0913 - what `init` is told, each by its name
    *,
    org: str,
    domain: str,
    hosts: tuple[str, ...],
    module: str,
    token_label: str = "birthmark",  # noqa: S107 - a name
    pin: str = "file:hsm/pin",
    softhsm_conf: str | None = None,
    ports: Mapping[str, int] | None = None,
) -> str:
    """The file that `init` writes: what was chosen, and each default as a comment.

    ports: by listener name, where they differ from the design's.
    """
    port = {**PORTS, **(ports or {})}
    conf = (
        f"softhsm_conf = {json.dumps(softhsm_conf)}"
        if softhsm_conf is not None
        else '# softhsm_conf = "hsm/softhsm2.conf"'
    )
    return _TEMPLATE.format(
        org=json.dumps(org, ensure_ascii=False),
        domain=json.dumps(domain),
        hosts=json.dumps(list(hosts)),
        module=json.dumps(module),
        token_label=json.dumps(token_label),
        pin=json.dumps(pin),
        conf=conf,
        **port,
    )


_TEMPLATE = """\
# Birthmark. Lines that begin with '#' show the defaults.

[fleet]
org = {org}
# The part of spiffe://DOMAIN/device/ID before the path. Certificates carry it.
domain = {domain}
# Names and addresses of this gateway; the first is the one that answers name.
hosts = {hosts}

# Ports. `public` is what certificates and answers name, where a balancer or a
# router stands in front. Port 0 takes a free one.
[listen.https]
port = {https}
# hosts = ["0.0.0.0", "::"]
# public = "gateway.example:443"
# plain_psk = false          # PSK without forward secrecy, for the very small

[listen.mqtts]
port = {mqtts}

[listen.http]                # /ocsp, /crl, /ca: certificates name this one
port = {http}

[listen.coaps]
enabled = false
port = {coaps}

[listen.operator]
enabled = false
port = {operator}

# Any PKCS#11 module. The PIN is never written here: file:PATH, env:NAME or
# command:ARGV say where it comes from. Paths are absolute or below this folder.
[hsm]
module = {module}
token_label = {token_label}
pin = {pin}
{conf}
# deadline = "10s"

[registry]
# url = "sqlite+aiosqlite:///..."     # registry.sqlite3 in this folder

[broker]
# managed = true             # the gateway runs a mosquitto of its own
# host = "127.0.0.1"         # of another broker, with managed = false
# port = 1883

[tls]
# policy = "modern"

[limits]
# connections = 20000        # of each listener
# connections_of_a_device = 32
# handshakes = 1000          # at the same time
# handshake_deadline = "10s"
# header_deadline = "10s"
# body_deadline = "20s"
# keep_alive = "75s"
# http_header_bytes = 8190
# http_body_bytes = 65536
# mqtt_packet_bytes = 262144
# mqtt_connect_deadline = "10s"

[rotation]
# grace = "1h"               # the old credential after the new one's first connection

[outages]
# registry_grace = "60s"     # live connections without the registry

[psk]
# cache_for = "5m"           # proven keys in memory
# cache_size = 10000

[revocation]
# crl_lifetime = "7d"        # the longest HSM outage that nobody notices
# ocsp_lifetime = "24h"
# presign_every = "5m"

# [profiles.ldevid]          # a new name makes a new profile, `like` another
# lifetime = "30d"           # or "never"
# expired_grace = "365d"     # the way back of a device that slept; "0" for none
# renew_at = 0.66
# renew_jitter = 0.1
# curves = ["P-256", "P-384"]
"""
