"""What enrolment is told by the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from provisioning.model.ids import TrustDomain
    from provisioning.x509.profiles import Profile

DEFAULT_PROFILE = "ldevid"
"""What a device gets that names no profile (EST without a label)."""


@dataclass(frozen=True, slots=True)
class EnrolmentPolicy:
    """Enrolment's part of the configuration.

    intent_stale: when an unresolved intent of another process counts as dead; longer
    than any signature may take.
    """

    domain: TrustDomain
    profiles: Mapping[str, Profile]
    intent_stale: timedelta = timedelta(seconds=30)
