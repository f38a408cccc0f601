"""Two places for credentials, `a` and `b`, of which one is always whole.

A slot is a folder: `meta.json`, and `key.pem` with `request.der`, to which `chain.pem`
comes when the gateway has answered; or `psk.json`. A slot is filled in a folder beside
and renamed into its place whole; `chain.pem` comes by one rename. The slot that
`active` names is never the one written to. So whichever write the power cuts off, the
active credential is untouched, and what is in the other slot is whole or not there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from device_agent import files, keys
from device_agent.plan import Found, Held, Slot
from provisioning.model.credentials import CredentialKind
from provisioning.model.errors import PeerError, Unusable
from provisioning.model.ids import PskIdentity
from provisioning.tls.context import ClientCertificate, ClientPsk

if TYPE_CHECKING:
    from pathlib import Path

SLOTS: Final[tuple[Slot, ...]] = ("a", "b")
PSK_OCTETS: Final = range(16, 65)
"""128 bits at least (RFC 9257, 6); 64 octets are more than any hash gives."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A key and the request that is made again, byte for byte, until it is answered."""

    key_pem: bytes = field(repr=False)
    request_der: bytes


@dataclass(frozen=True, slots=True)
class Meta:
    """What a slot says of itself. jitter: 0 to 1, drawn when it was made."""

    number: int
    mode: str
    jitter: float
    made: datetime

    def encode(self) -> bytes:
        """As `meta.json` holds it."""
        document = {
            "number": self.number,
            "mode": self.mode,
            "jitter": self.jitter,
            "made": self.made.isoformat(),
        }
        return json.dumps(document).encode()

    @classmethod
    def decode(cls, content: bytes) -> Meta:
        """From `meta.json`. Raises ValueError for what was never written by us."""
        document = json.loads(content)
        if not isinstance(document, dict):
            raise ValueError("meta.json is no object")  # noqa: TRY004 - bad content
        number, mode = document.get("number"), document.get("mode")
        jitter, made = document.get("jitter"), document.get("made")
        if (
            not isinstance(number, int)
            or mode not in ("cert", "psk")
            or not isinstance(jitter, float | int)
            or not isinstance(made, str)
        ):
            raise ValueError("meta.json has other fields")
        moment = datetime.fromisoformat(made)
        if moment.tzinfo is None:
            raise ValueError("meta.json has a time without its zone")
        return cls(number, str(mode), float(jitter), moment.astimezone(UTC))


def read_psk(content: bytes) -> ClientPsk:
    """A PSK as `birthmark psk create --json` prints it. Raises ValueError."""
    document = json.loads(content)
    identity = document.get("identity") if isinstance(document, dict) else None
    key = document.get("key") if isinstance(document, dict) else None
    if not isinstance(identity, str) or not isinstance(key, str):
        raise ValueError('it is not {"identity": …, "key": HEX}')  # noqa: TRY004 - bad content
    try:
        octets = bytes.fromhex(key)
        PskIdentity.parse(identity)
    except (ValueError, PeerError):
        # From none: the cause would quote the key's text.
        raise ValueError(
            "its identity is not ID#GENERATION or its key not HEX"
        ) from None
    if len(octets) not in PSK_OCTETS:
        raise ValueError(f"its key has {len(octets)} octets, not 16 to 64")
    return ClientPsk(identity, octets)


def write_psk(psk: ClientPsk) -> bytes:
    """As `psk.json` holds it: the same form."""
    return json.dumps({"identity": psk.identity, "key": psk.key.hex()}).encode()


class Slots:
    """The credentials of one device, on disk. Every write may raise OSError."""

    def __init__(self, state: Path, disk: files.Disk) -> None:
        self._folder = state / "slots"
        self._active = state / "active"
        self._disk = disk

    def make(self) -> None:
        """Make what is missing of the folder."""
        files.private_folder(self._folder)

    def find(self) -> Found:
        """What is there. Raises Unusable when all that is there is damaged."""
        if not files.check_folder(self._folder):
            return Found()
        held: list[Held] = []
        asked: list[tuple[Slot, int]] = []
        damage: Unusable | None = None
        for slot in SLOTS:
            try:
                seen = self._look(slot)
            except Unusable as error:
                damage = error
                continue
            if isinstance(seen, Held):
                held.append(seen)
            elif seen is not None:
                asked.append((slot, seen))
        if damage is not None and not held:
            raise damage
        return Found(self.active(), tuple(held), tuple(asked))

    def active(self) -> Slot | None:
        """The slot that `active` names; None when nothing was ever activated."""
        content = files.read_private(self._active)
        if content is None:
            return None
        name = content.strip()
        for slot in SLOTS:
            if name == slot.encode():
                return slot
        raise Unusable(str(self._active), "it names neither slot")

    def prepare(self, slot: Slot, meta: Meta, pending: Pending) -> None:
        """Have a key and its request on disk before the request is sent."""
        self._fill(
            slot,
            {
                "key.pem": pending.key_pem,
                "request.der": pending.request_der,
                "meta.json": meta.encode(),
            },
        )

    def pending(self, slot: Slot) -> Pending:
        """The saved request of a slot."""
        return Pending(self._need(slot, "key.pem"), self._need(slot, "request.der"))

    def keep(self, held: Held, material: bytes, made: datetime) -> None:
        """Have a new credential on disk: its chain beside its key, or a PSK."""
        if held.kind is CredentialKind.CERTIFICATE:
            path = self._folder / held.slot / "chain.pem"
            self._disk.write_atomically(path, material)
            return
        meta = Meta(held.number, "psk", held.jitter, made)
        self._fill(held.slot, {"psk.json": material, "meta.json": meta.encode()})

    def received(self, slot: Slot, chain_pem: bytes) -> tuple[Held, str | None]:
        """What a chain will be in this slot, and the device that it names.

        Raises ValueError when it does not fit the slot's key.
        """
        meta = Meta.decode(self._need(slot, "meta.json"))
        key_pem = self._need(slot, "key.pem")
        held = held_certificate(slot, meta, chain_pem, key_pem)
        return held, keys.read_chain(chain_pem, key_pem).device

    def activate(self, slot: Slot) -> None:
        """Name a slot as the one to live with; one rename, so never none."""
        self._disk.write_atomically(self._active, f"{slot}\n".encode())

    def discard(self, slot: Slot) -> None:
        """Forget a slot that is not active."""
        if self.active() == slot:
            raise Unusable(str(self._folder / slot), "it is active")
        gone = self._folder / ".gone"
        self._disk.remove(gone)
        if (self._folder / slot).exists():
            self._disk.rename(self._folder / slot, gone)
            self._disk.sync(self._folder)
            self._disk.remove(gone)

    def credential(self, held: Held) -> ClientCertificate | ClientPsk:
        """What TLS proves this device by."""
        if held.kind is CredentialKind.PSK:
            return self._psk(held.slot)
        return ClientCertificate(
            self._need(held.slot, "chain.pem"), self._need(held.slot, "key.pem")
        )

    def _look(self, slot: Slot) -> Held | int | None:
        """The credential in a slot, the number of a request without one, or None."""
        folder = self._folder / slot
        if not files.check_folder(folder):
            return None
        try:
            meta = Meta.decode(self._need(slot, "meta.json"))
            if meta.mode == "psk":
                return _held_psk(slot, meta, self._psk(slot).identity)
            chain = files.read_private(folder / "chain.pem")
            if chain is None:
                self.pending(slot)
                return meta.number
            return held_certificate(slot, meta, chain, self._need(slot, "key.pem"))
        except (ValueError, OverflowError, RecursionError) as error:
            raise Unusable(str(folder), f"its content is damaged ({error})") from error

    def _psk(self, slot: Slot) -> ClientPsk:
        try:
            return read_psk(self._need(slot, "psk.json"))
        except ValueError as error:
            path = self._folder / slot / "psk.json"
            raise Unusable(str(path), f"its content is damaged ({error})") from error

    def _need(self, slot: Slot, name: str) -> bytes:
        path = self._folder / slot / name
        content = files.read_private(path)
        if content is None:
            raise Unusable(str(path), "it is missing")
        return content

    def _fill(self, slot: Slot, content: dict[str, bytes]) -> None:
        if self.active() == slot:
            # Only after an `active` that did not reach the disk: repeat that first.
            other: Slot = "b" if slot == "a" else "a"
            self.activate(other)
        new, gone = self._folder / ".new", self._folder / ".gone"
        self._disk.remove(new)
        self._disk.remove(gone)
        self._disk.make_folder(new)
        for name, octets in content.items():
            self._disk.write(new / name, octets)
        self._disk.sync(new)
        if (self._folder / slot).exists():
            self._disk.rename(self._folder / slot, gone)
        self._disk.rename(new, self._folder / slot)
        self._disk.sync(self._folder)
        self._disk.remove(gone)


def held_certificate(slot: Slot, meta: Meta, chain: bytes, key_pem: bytes) -> Held:
    """A certificate of ours in a slot. Raises ValueError when it fits not the key."""
    leaf = keys.read_chain(chain, key_pem)
    held = _held_psk(slot, meta, None)
    return replace(
        held,
        kind=CredentialKind.CERTIFICATE,
        serial=leaf.serial,
        not_before=leaf.not_before,
        not_after=leaf.not_after,
    )


def _held_psk(slot: Slot, meta: Meta, identity: str | None) -> Held:
    return Held(
        slot,
        meta.number,
        CredentialKind.PSK,
        None,
        identity,
        meta.made,
        None,
        meta.jitter,
    )
