"""Fresh SoftHSM tokens for demos and tests, each in a folder of its own."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from provisioning.hsm.initialise import find_softhsm, make_softhsm_token_now
from provisioning.hsm.login import TokenConfig
from provisioning.hsm.pin import Pin
from provisioning.hsm.token import HSM
from provisioning.model.errors import Unusable

if TYPE_CHECKING:
    from pathlib import Path

LABEL = "simulated"


def make_token(
    folder: Path, *, label: str = LABEL, deadline_s: float = 10.0
) -> TokenConfig:
    """Make a token in the folder; blocks for the tenth of a second that it takes.

    One process can use many of these one after another (SoftHSM reads its
    configuration when it is opened), but one at a time.
    Raises Unusable where SoftHSM is not installed.
    """
    module = find_softhsm()
    if module is None:
        raise Unusable(HSM, "SoftHSM is not installed; install the package softhsm2")
    pin = Pin(secrets.token_hex(8))
    conf = make_softhsm_token_now(
        str(folder), label, pin.text, secrets.token_hex(8), module
    )
    return TokenConfig(module, label, pin, conf, deadline_s)
