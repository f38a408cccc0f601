"""What operators see and do of the CA: the hierarchy, its anchors, its lists."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from provisioning.ca.hierarchy import load_hierarchy
from provisioning.ca.publish import CrlFiles
from provisioning.model.errors import PeerError
from provisioning.model.refusals import ARGUMENT_MALFORMED
from provisioning.x509.chain import fingerprint_sha256

if TYPE_CHECKING:
    from gateway.operators.desk import Desk
    from provisioning.config import Config

Document = dict[str, object]
NO_END_YEAR = 9999


def show_authority(config: Config) -> Document:
    """Every CA with its fingerprint, which `--ca-sha256` takes for the root."""
    hierarchy = load_hierarchy(config.ca)
    return {
        "cas": [
            {
                "name": name,
                "subject": issuer.certificate.subject.rfc4514_string(),
                "issuer": issuer.certificate.issuer.rfc4514_string(),
                "serial": f"{issuer.certificate.serial_number:x}",
                "sha256": fingerprint_sha256(hierarchy.certificates[name]),
                "not_after": None
                if issuer.not_after.year == NO_END_YEAR
                else issuer.not_after.strftime("%Y-%m-%dT%H:%M:%SZ"),
                "profiles": sorted(
                    profile.name
                    for profile in config.profiles.values()
                    if profile.issuer == name
                ),
            }
            for name, issuer in hierarchy.issuers.items()
        ]
    }


def export_anchors(config: Config, form: str) -> bytes:
    """The trust anchors: PEM, or the root's DER."""
    hierarchy = load_hierarchy(config.ca)
    if form == "pem":
        return hierarchy.anchors_pem
    if form == "der":
        return hierarchy.anchors[0]
    raise PeerError(ARGUMENT_MALFORMED, "A format is one of pem, der.")


async def publish_crls(desk: Desk) -> Document:
    """Sign a fresh CRL of every CA and put it where it is served."""
    hierarchy = load_hierarchy(desk.config.ca)
    published: list[Document] = []

    def tell(_: str, fields: object) -> None:
        if isinstance(fields, dict):
            published.append(dict(fields))

    files = CrlFiles(
        registry=desk.registry,
        token=await desk.token(),
        hierarchy=hierarchy,
        settings=desk.config.ca,
        clock=lambda: desk.now,
        on_event=tell,
    )
    await files.refresh()
    return {"published": published}


def new_pin() -> str:
    """A PIN that nobody has to remember: 32 hexadecimal digits."""
    return secrets.token_hex(16)
