"""Profiles: what a kind of certificate is for, how long, and who may have it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from provisioning.x509.csr import KeyRules

NO_END = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
"""notAfter of what has no end (RFC 5280, 4.1.2.5): 99991231235959Z."""

_NEVER = timedelta(0)
_KEYS = KeyRules(curves=frozenset({"P-256", "P-384"}), rsa_min_bits=2048)


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of certificate.

    issuer: name of the CA that signs it, "issuing" or "factory".
    lifetime: from the moment of issue, None for no end. backdate: how much earlier
    notBefore is, for devices whose clock is behind.
    expired_grace: how long after its end it may still re-enrol; 0 for not at all.
    renew_at: fraction of the validity after which a device renews; renew_jitter:
    fraction that it adds at random, so that a fleet does not come at once.
    from_profiles: certificates of which profiles admit to it; psk, token: whether
    those do.
    """

    name: str
    issuer: str
    lifetime: timedelta | None
    keys: KeyRules = _KEYS
    backdate: timedelta = timedelta(hours=1)
    server_auth: bool = False
    client_auth: bool = True
    expired_grace: timedelta = _NEVER
    renew_at: float = 2 / 3
    renew_jitter: float = 0.1
    from_profiles: frozenset[str] = frozenset()
    psk: bool = False
    token: bool = False


DEFAULTS: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        # Factory identity (IEEE 802.1AR, IDevID): outlives every CA but its own.
        Profile("idevid", "factory", None, token=True),
        Profile(
            "ldevid",
            "issuing",
            timedelta(days=30),
            expired_grace=timedelta(days=365),
            from_profiles=frozenset({"idevid", "ldevid"}),
            psk=True,
            token=True,
        ),
        # With the backdating still under the 90 days that STANDARDS asks for.
        Profile(
            "server",
            "issuing",
            timedelta(days=89),
            server_auth=True,
            client_auth=False,
        ),
        # No device enrols for these: they are given by an operator's command.
        Profile("station", "issuing", timedelta(days=30)),
        Profile("operator", "issuing", timedelta(days=30)),
    )
}


def validity(
    profile: Profile, now: datetime, issuer_end: datetime = NO_END
) -> tuple[datetime, datetime]:
    """The two ends, inclusive, of a certificate issued now, in whole seconds.

    issuer_end: notAfter of the issuing CA, which nothing outlives (RFC 5280, 6.1
    would refuse the rest of its life).
    """
    moment = now.astimezone(UTC).replace(microsecond=0)
    if profile.lifetime is None or profile.lifetime >= issuer_end - moment:
        return moment - profile.backdate, issuer_end
    return moment - profile.backdate, moment + profile.lifetime
