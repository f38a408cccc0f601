"""What a key must be allowed to do, and what it must not: read back, not assumed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from pkcs11 import Attribute, KeyType

from provisioning.hsm.session import P256, SECRET_BYTES
from provisioning.hsm.token import HSM
from provisioning.model.errors import Unusable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from provisioning.hsm.owner import Keyring

_MUST: dict[Attribute, bool] = {
    Attribute.TOKEN: True,
    Attribute.PRIVATE: True,
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
    Attribute.SIGN: True,
    # A key that also decrypts, derives or unwraps has other uses than ours.
    Attribute.DECRYPT: False,
    Attribute.UNWRAP: False,
    Attribute.DERIVE: False,
}
_MUST_SECRET = _MUST | {Attribute.ENCRYPT: False, Attribute.WRAP: False}

_WHERE_IT_HAS_THEM: dict[Attribute, bool] = {
    Attribute.ALWAYS_SENSITIVE: True,
    Attribute.NEVER_EXTRACTABLE: True,
    # It would ask for the PIN at each signature.
    Attribute.ALWAYS_AUTHENTICATE: False,
}

_PROBE = b"birthmark: do the two halves belong together?"


def check_keys(
    keyring: Keyring, ec_labels: Sequence[str], hmac_labels: Sequence[str]
) -> None:
    """Raise Unusable that names each key with what is wrong with it."""
    faults = [
        f"{label!r}: {', '.join(found)}"
        for label, found in (
            *((label, _ec_faults(keyring, label)) for label in ec_labels),
            *((label, _secret_faults(keyring, label)) for label in hmac_labels),
        )
        if found
    ]
    if faults:
        raise Unusable(
            HSM,
            f"keys are not as they must be ({'; '.join(faults)}); make them anew, in "
            f"the token, with those attributes",
        )


def _ec_faults(keyring: Keyring, label: str) -> list[str]:
    pair = keyring.pair(label)
    wanted = (*_MUST, *_WHERE_IT_HAS_THEM, Attribute.KEY_TYPE, Attribute.EC_PARAMS)
    has = keyring.session.read(pair.private, wanted)
    faults = _faults(has, _MUST)
    if has.get(Attribute.KEY_TYPE) != KeyType.EC:
        faults.append("CKA_KEY_TYPE is not CKK_EC")
    if has.get(Attribute.EC_PARAMS, P256) != P256:
        faults.append("CKA_EC_PARAMS is not P-256")
    if not faults and not _halves_fit(keyring, label):
        faults.append("the public key of that label is another key's")
    return faults


def _secret_faults(keyring: Keyring, label: str) -> list[str]:
    wanted = (
        *_MUST_SECRET,
        *_WHERE_IT_HAS_THEM,
        Attribute.KEY_TYPE,
        Attribute.VALUE_LEN,
    )
    has = keyring.session.read(keyring.secret(label).stored, wanted)
    faults = _faults(has, _MUST_SECRET)
    if has.get(Attribute.KEY_TYPE) not in (KeyType.GENERIC_SECRET, KeyType.SHA256_HMAC):
        faults.append("CKA_KEY_TYPE is not CKK_GENERIC_SECRET")
    length = has.get(Attribute.VALUE_LEN, SECRET_BYTES)
    if length != SECRET_BYTES:
        faults.append(f"CKA_VALUE_LEN is {length}, not {SECRET_BYTES}")
    return faults


def _faults(
    has: Mapping[Attribute, object], must: Mapping[Attribute, bool]
) -> list[str]:
    faults = [
        f"CKA_{attribute.name} is not {str(value).lower()}"
        for attribute, value in must.items()
        if has.get(attribute) is not value
    ]
    faults += [
        f"CKA_{attribute.name} is not {str(value).lower()}"
        for attribute, value in _WHERE_IT_HAS_THEM.items()
        if has.get(attribute, value) is not value
    ]
    return faults


def _halves_fit(keyring: Keyring, label: str) -> bool:
    key = keyring.key(label)
    algorithm = ec.ECDSA(hashes.SHA256())
    try:
        key.public_key().verify(key.sign(_PROBE, algorithm), _PROBE, algorithm)
    except InvalidSignature:
        return False
    return True
