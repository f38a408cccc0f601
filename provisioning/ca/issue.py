"""One certificate: sign, inspect, record; the intent stands already, release follows.

The order is the promise (DESIGN, "a credential exists once"). The intent, with its
serial, was durable before the token was asked, so no serial can come twice. The
outcome is durable before the certificate is returned, so nothing that a device
received is missing from the registry. Between the two a signature may be lost, never
a record.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from provisioning.model.errors import OutcomeUnknown, Unavailable, Unusable
from provisioning.x509.build import Intention, device_certificate
from provisioning.x509.inspect import inspect
from provisioning.x509.profiles import NO_END

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from cryptography.hazmat.primitives.asymmetric import ec

    from provisioning.ca.hierarchy import Hierarchy
    from provisioning.hsm.token import Token
    from provisioning.model.admitted import Admitted
    from provisioning.registry.records import NewIntent
    from provisioning.registry.store import Registry
    from provisioning.x509.csr import VerifiedCsr
    from provisioning.x509.profiles import Profile


@dataclass(frozen=True, slots=True)
class Signing:
    """What issuing needs of the rest of the house.

    abandoned: intents of this process that ended, and the registry could not be told:
    nobody works on them, so the next attempt at their request need not wait.
    """

    registry: Registry
    token: Token
    hierarchy: Hierarchy
    profiles: Mapping[str, Profile]
    clock: Callable[[], datetime]
    abandoned: set[int] = field(default_factory=set)


async def issue(
    admitted: Admitted, csr: VerifiedCsr, intent: NewIntent, signing: Signing
) -> bytes:
    """Sign and record the certificate of an intent; its DER.

    Raises Unavailable when the token or the registry is away, Unusable when the
    operator must act. In every case that gave no certificate the intent is voided, or
    stays for recovery to void, so that a retry of the request starts afresh with
    another serial: what may have been signed meanwhile was never released.
    """
    intention = Intention(
        device=admitted.device,
        domain=signing.hierarchy.domain,
        serial=intent.serial,
        profile=signing.profiles[admitted.profile],
        not_before=intent.not_before,
        not_after=intent.not_after or NO_END,
        public_key_der=csr.public_key_der,
    )
    issuer = signing.hierarchy.issuers[intent.issuer]

    def sign(key: ec.EllipticCurvePrivateKey) -> bytes:
        der = device_certificate(intention, issuer, key)
        # Read again before it is recorded: a broken token or builder must not put
        # into the world what nobody decided on.
        inspect(der, intention, issuer)
        return der

    try:
        der = await signing.token.use(issuer.name, sign)
    except (Unavailable, Unusable) as error:
        await _void(signing, intent, str(error))
        raise
    except OutcomeUnknown:
        # Signed or not, it was never released, and its serial is spent.
        await _void(signing, intent, "the signature was asked for and not received")
        raise Unavailable("HSM") from None
    await _record(signing, intent, der)
    return der


async def _record(signing: Signing, intent: NewIntent, der: bytes) -> None:
    """Only when this returns may the certificate be released."""
    try:
        await signing.registry.finish(intent, der, signing.clock())
    except OutcomeUnknown:
        # It may be written: asked again, the registry knows. If it is, nothing is
        # written twice; if somebody voided the intent meanwhile, it says so again.
        await _record_again(signing, intent, der)
    except Unavailable:
        # Not written. The retry finds the intent dead, and voids it.
        signing.abandoned.add(intent.id)
        raise


async def _record_again(signing: Signing, intent: NewIntent, der: bytes) -> None:
    try:
        await signing.registry.finish(intent, der, signing.clock())
    except (OutcomeUnknown, Unavailable):
        # If it was written, the retry repeats the certificate; if not, as above.
        signing.abandoned.add(intent.id)
        raise Unavailable("registry") from None


async def _void(signing: Signing, intent: NewIntent, why: str) -> None:
    """Give the token's use back; if the registry is away too, the retry does it."""
    try:
        await asyncio.shield(signing.registry.void(intent.id, why, signing.clock()))
    except (Unavailable, OutcomeUnknown):
        signing.abandoned.add(intent.id)
