"""One open session: each thing that is asked of a module, through python-pkcs11."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pkcs11
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass
from pkcs11.util.ec import encode_named_curve_parameters
from typing_extensions import override

from provisioning.hsm.faults import KeyFunctionNotPermittedError
from provisioning.hsm.token import HSM
from provisioning.model.errors import Unusable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

P256 = encode_named_curve_parameters("secp256r1")
SECRET_BYTES = 32
_UNCOMPRESSED_P256 = 65


class Object(Protocol):
    """An object's handle: its attributes can be read and set."""

    def __getitem__(self, attribute: Attribute, /) -> Any: ...
    def __setitem__(self, attribute: Attribute, value: Any, /) -> None: ...


class SigningKey(Object, Protocol):
    """A private key or a secret."""

    def sign(self, data: bytes, **options: Any) -> bytes: ...


@dataclass(frozen=True, slots=True)
class EcPair:
    """The two objects of a key, and the public half as cryptography has it.

    signer: what signs; the private object, or this session's copy of it.
    """

    private: SigningKey
    signer: SigningKey
    public: Object
    public_key: ec.EllipticCurvePublicKey


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret's object, and what makes HMACs: itself, or this session's copy."""

    stored: Object
    signer: SigningKey


class Session(Protocol):
    """What the owner of a token asks of its session; all of it blocks.

    Raises PKCS11Error, for faults.py to judge, and Unusable where a label is wrong.
    """

    def find_ec(self, label: str) -> EcPair: ...
    def find_secret(self, label: str) -> Secret: ...
    def sign(self, key: SigningKey, digest: bytes) -> bytes: ...
    def mac(self, key: SigningKey, message: bytes) -> bytes: ...
    def make_ec(self, label: str) -> EcPair: ...
    def make_secret(self, label: str) -> None: ...
    def set_id(self, pair: EcPair, key_id: bytes) -> None: ...
    def read(
        self, key: Object, wanted: Iterable[Attribute]
    ) -> Mapping[Attribute, object]:
        """Those of the wanted attributes that the token has."""
        ...

    def close(self) -> None: ...


class ModuleSession:
    """A session of a real module."""

    def __init__(self, library: Any, session: pkcs11.Session) -> None:
        self._library = library
        self._session = session

    def find_ec(self, label: str) -> EcPair:
        private = self._find(ObjectClass.PRIVATE_KEY, label)
        public = self._find(ObjectClass.PUBLIC_KEY, label)
        return _pair(label, private, self._signer(private), public)

    def find_secret(self, label: str) -> Secret:
        stored = self._find(ObjectClass.SECRET_KEY, label)
        return Secret(stored, self._signer(stored))

    def sign(self, key: SigningKey, digest: bytes) -> bytes:
        _must_sign(key)
        # The buffer's default of 8 KiB would be cleared at each call.
        return key.sign(digest, mechanism=Mechanism.ECDSA, buffer_size=144)

    def mac(self, key: SigningKey, message: bytes) -> bytes:
        _must_sign(key)
        return key.sign(message, mechanism=Mechanism.SHA256_HMAC, buffer_size=32)

    def make_ec(self, label: str) -> EcPair:
        self._refuse_second(ObjectClass.PRIVATE_KEY, label)
        self._refuse_second(ObjectClass.PUBLIC_KEY, label)
        parameters = self._session.create_domain_parameters(
            KeyType.EC, {Attribute.EC_PARAMS: P256}, local=True
        )
        public, private = parameters.generate_keypair(
            # Joins the two until the identifier of the public key is known.
            id=hashlib.sha256(label.encode()).digest()[:20],
            label=label,
            store=True,
            capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,
            private_template=_NEVER_READ | {Attribute.DERIVE: False},
            public_template={Attribute.PRIVATE: False},
        )
        pair = _pair(label, private, private, public)
        self.set_id(
            pair, x509.SubjectKeyIdentifier.from_public_key(pair.public_key).digest
        )
        return pair

    def make_secret(self, label: str) -> None:
        self._refuse_second(ObjectClass.SECRET_KEY, label)
        self._session.generate_key(
            KeyType.GENERIC_SECRET,
            8 * SECRET_BYTES,
            id=hashlib.sha256(label.encode()).digest()[:20],
            label=label,
            store=True,
            capabilities=MechanismFlag.SIGN,
            template=_NEVER_READ,
        )

    def set_id(self, pair: EcPair, key_id: bytes) -> None:
        pair.private[Attribute.ID] = key_id
        pair.public[Attribute.ID] = key_id

    def read(self, key: Object, wanted: Iterable[Attribute]) -> dict[Attribute, object]:
        found = {}
        for attribute in wanted:
            # Not every token has every attribute; what it lacks cannot be judged.
            with contextlib.suppress(
                pkcs11.AttributeTypeInvalid, pkcs11.AttributeSensitive
            ):
                found[attribute] = key[attribute]
        return found

    def close(self) -> None:
        # What is left of a session that fails to close goes with the module, and
        # p11-kit connects to a server that came back only after C_Finalize.
        for step in (self._session.close, self._library.finalize):
            with contextlib.suppress(pkcs11.PKCS11Error):
                step()

    def _objects(self, kind: ObjectClass, label: str) -> list[Any]:
        # Of the token: the copies of `_signer` carry the same labels.
        wanted = {
            Attribute.CLASS: kind,
            Attribute.LABEL: label,
            Attribute.TOKEN: True,
        }
        return list(self._session.get_objects(wanted))

    def _find(self, kind: ObjectClass, label: str) -> Any:
        found = self._objects(kind, label)
        if len(found) == 1:
            return found[0]
        name = kind.name.lower().replace("_", " ")
        if found:
            raise Unusable(
                HSM,
                f"the token has {len(found)} objects of kind {name} labelled "
                f"{label!r}; remove or rename those that are not the gateway's",
            )
        raise Unusable(
            HSM,
            f"the token has no {name} labelled {label!r}; restore the token, "
            f"configure the right one, or make its keys with `birthmark init`",
        )

    def _signer(self, stored: Any) -> Any:
        """What to sign with: in SoftHSM a copy that lives as long as the session.

        SoftHSM 2.6 locks and reads the token's files each time it meets an object of
        the token: 64 µs for an HMAC instead of 30, 154 for a signature instead of
        116. The copy is as sensitive as what it is made from, and never on disk.
        """
        if self._library.manufacturer_id != "SoftHSM":
            return stored
        return stored.copy({Attribute.TOKEN: False})

    def _refuse_second(self, kind: ObjectClass, label: str) -> None:
        if self._objects(kind, label):
            raise Unusable(
                HSM,
                f"the token has a key labelled {label!r} already, which is left as "
                f"it is; choose another token",
            )

    @override
    def __repr__(self) -> str:
        return "<ModuleSession>"


_NEVER_READ: dict[Attribute, Any] = {
    Attribute.PRIVATE: True,
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
}


def _must_sign(key: SigningKey) -> None:
    if not isinstance(key, pkcs11.SignMixin):
        raise KeyFunctionNotPermittedError


def _pair(label: str, private: Any, signer: Any, public: Any) -> EcPair:
    parameters = public[Attribute.EC_PARAMS]
    point = _point(public[Attribute.EC_POINT])
    if parameters != P256 or point is None:
        raise Unusable(HSM, f"the key labelled {label!r} is not a P-256 key")
    return EcPair(
        private,
        signer,
        public,
        ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point),
    )


def _point(value: bytes) -> bytes | None:
    """The point in a CKA_EC_POINT: an OCTET STRING of it, or, in some tokens, bare.

    Of 65 bytes either way, for an uncompressed point of P-256.
    """
    if len(value) == _UNCOMPRESSED_P256 + 2 and value[:3] == b"\x04\x41\x04":
        return value[2:]
    if len(value) == _UNCOMPRESSED_P256 and value[:1] == b"\x04":
        return value
    return None
