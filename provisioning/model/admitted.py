"""Proof that somebody may have something; only enrol/admission.py makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from provisioning.model.credentials import AuthMethod
    from provisioning.model.ids import DeviceId


@dataclass(frozen=True, slots=True)
class Admitted:
    """A device may have a credential of a profile: holding one is the proof.

    proof: what the request's identity for idempotent answers is made from: a digest
    of the token, or the credential's row; never a secret.
    """

    device: DeviceId
    profile: str
    auth: AuthMethod
    proof: bytes
