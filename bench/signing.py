"""sign.certificate and crl.100k: the CA's own work, with the key in the token.

In this process, by its own CPU time: there is no server in between.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509

from bench.house import csr, new_key
from bench.results import RATE, Result, spread
from hsm_sim.tokens import make_token
from provisioning.hsm.pkcs11 import open_token
from provisioning.model.credentials import RevocationReason
from provisioning.model.ids import DeviceId, Serial, TrustDomain
from provisioning.x509.build import (
    Intention,
    Issuer,
    Term,
    Urls,
    ca_name,
    device_certificate,
    root_certificate,
)
from provisioning.x509.crl import CrlEntry, crl
from provisioning.x509.csr import verify_csr
from provisioning.x509.inspect import inspect
from provisioning.x509.profiles import DEFAULTS, validity

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric import ec

    from bench.rounds import Plan
    from provisioning.hsm.token import Token

AT_ONCE = 32
ENTRIES = 100_000
_LABEL = "issuing"
_PROFILE = DEFAULTS["ldevid"]
_DOMAIN = TrustDomain.parse("bench.example")


def certificate(_house: object, folder: Path, plan: Plan, name: str) -> Result:
    """CSR checked, certificate built, signed and inspected; beside a software key."""
    return asyncio.run(_certificate(folder, plan, name))


def crl_100k(_house: object, folder: Path, plan: Plan, name: str) -> Result:
    """A list of 100,000 entries, from entries to signed DER."""
    return asyncio.run(_crl(folder, plan, name))


async def _certificate(folder: Path, plan: Plan, name: str) -> Result:
    token = await open_token(make_token(folder))
    try:
        await token.make_ec_key(_LABEL)
        issuer = await token.use(_LABEL, _issuer)
        key = new_key()
        software = _issuer(key)
        requests = [_request() for _ in range(AT_ONCE * (4 if plan.quick else 32))]

        async def by_token(device: DeviceId, der: bytes) -> None:
            await _signed(device, der, issuer, token)

        async def by_software(device: DeviceId, der: bytes) -> None:
            _sign(_intention(device, der), software, key)

        ours, theirs = [], []
        for _ in range(plan.rounds + 1):
            ours.append(await _rate(requests, by_token))
            theirs.append(await _rate(requests, by_software))
    finally:
        await token.close()
    return spread(name, ours[1:], RATE, ("software key", theirs[1:]))


async def _rate(
    requests: list[tuple[DeviceId, bytes]],
    one: Callable[[DeviceId, bytes], Awaitable[None]],
) -> float:
    left = iter(requests)

    async def worker() -> None:
        for device, der in left:
            await one(device, der)

    before = time.process_time()
    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    return len(requests) / (time.process_time() - before)


async def _signed(device: DeviceId, der: bytes, issuer: Issuer, token: Token) -> None:
    intention = _intention(device, der)
    await token.use(_LABEL, lambda key: _sign(intention, issuer, key))


def _sign(
    intention: Intention, issuer: Issuer, key: ec.EllipticCurvePrivateKey
) -> None:
    inspect(device_certificate(intention, issuer, key), intention, issuer)


def _intention(device: DeviceId, der: bytes) -> Intention:
    found = verify_csr(der, _PROFILE.keys)
    now = datetime.now(UTC)
    serial = Serial(x509.random_serial_number())
    ends = validity(_PROFILE, now)
    return Intention(device, _DOMAIN, serial, _PROFILE, *ends, found.public_key_der)


def _request() -> tuple[DeviceId, bytes]:
    device = DeviceId.parse(f"bench-{x509.random_serial_number() % 10**9}")
    return device, csr(new_key(), device.text)


def _issuer(key: ec.EllipticCurvePrivateKey) -> Issuer:
    term = Term(
        Serial(x509.random_serial_number()), datetime.now(UTC).replace(microsecond=0)
    )
    der = root_certificate(ca_name("Bench CA", "Bench"), key, term)
    base = "http://gateway.example:8080"
    urls = Urls(f"{base}/ocsp", f"{base}/crl/issuing.crl", f"{base}/ca/issuing.crt")
    return Issuer(_LABEL, x509.load_der_x509_certificate(der), urls)


async def _crl(folder: Path, plan: Plan, name: str) -> Result:
    now = datetime.now(UTC).replace(microsecond=0)
    entries = [
        CrlEntry(
            Serial(x509.random_serial_number()),
            now,
            RevocationReason.SUPERSEDED,
        )
        for _ in range(ENTRIES)
    ]
    token = await open_token(make_token(folder))
    spent, size = [], 0
    try:
        await token.make_ec_key(_LABEL)
        issuer = await token.use(_LABEL, _issuer)
        for number in range(plan.rounds):
            before = time.process_time()
            der = await token.use(
                _LABEL,
                lambda key, n=number: crl(  # type: ignore[misc] # mypy cannot infer it
                    issuer, n + 1, now, now + timedelta(days=7), entries, key
                ),
            )
            spent.append(time.process_time() - before)
            size = len(der)
    finally:
        await token.close()
    return spread(name, spent, "s", more={"size": f"{size / 1e6:.1f} MB; CPU time"})
