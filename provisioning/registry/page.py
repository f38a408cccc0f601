"""What transactions of this process know and change: an identity map, and no I/O.

Operations look rows up here, decide, and change them here, one after the other, so
that each sees what those before it in the same group did. What they changed is then
written in few statements. The page outlives its transaction: as long as nobody else
has committed (the counter `group` tells), what was known stays known.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol, TypeVar

from provisioning.model import events
from provisioning.model.credentials import CredentialState, DeviceState
from provisioning.registry.rows import LIVE, DeviceRow
from provisioning.registry.schema import to_us

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from sqlalchemy.sql.dml import UpdateBase

    from provisioning.model.ids import DeviceId, Serial
    from provisioning.registry.rows import CredentialRow, IntentRow, TokenState

Parameters = dict[str, object]
T_co = TypeVar("T_co", covariant=True)


@dataclass(slots=True)
class Wants:
    """What the operations of a group must have at hand before they decide."""

    devices: set[str] = field(default_factory=set)
    credentials: set[int] = field(default_factory=set)
    serials: set[Serial] = field(default_factory=set)
    spkis: set[bytes] = field(default_factory=set)
    requests: set[bytes] = field(default_factory=set)
    token_hashes: set[bytes] = field(default_factory=set)
    token_ids: set[str] = field(default_factory=set)
    intents: set[int] = field(default_factory=set)
    # Intents whose certificate is wanted as well, if there is one already.
    finished: set[int] = field(default_factory=set)
    # Devices, folded: their live credentials; also those that ended; their open
    # intents; their newest generation.
    live: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    open_intents: set[str] = field(default_factory=set)
    generations: set[str] = field(default_factory=set)
    # Credentials whose device's live ones are wanted.
    live_beside: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Known:
    """What is known. A key with None, or an empty list, is known to lead nowhere."""

    devices: dict[str, DeviceRow | None] = field(default_factory=dict)
    device_rows: dict[int, DeviceRow] = field(default_factory=dict)
    credentials: dict[int, CredentialRow | None] = field(default_factory=dict)
    serials: dict[Serial, CredentialRow | None] = field(default_factory=dict)
    requests: dict[bytes, CredentialRow | None] = field(default_factory=dict)
    owners: dict[bytes, set[int]] = field(default_factory=dict)
    live: dict[int, list[CredentialRow]] = field(default_factory=dict)
    ended: dict[int, list[CredentialRow]] = field(default_factory=dict)
    generations: dict[int, int] = field(default_factory=dict)
    tokens: dict[bytes, TokenState | None] = field(default_factory=dict)
    token_ids: dict[str, TokenState | None] = field(default_factory=dict)
    intents: dict[int, IntentRow | None] = field(default_factory=dict)
    open_requests: dict[bytes, IntentRow | None] = field(default_factory=dict)
    open_keys: dict[bytes, list[IntentRow]] = field(default_factory=dict)

    def size(self) -> int:
        """How many rows and keys are held, about."""
        return len(self.devices) + len(self.credentials) + len(self.owners)


@dataclass(slots=True)
class Work:
    """What one group changed and has to write."""

    new_devices: dict[int, DeviceRow] = field(default_factory=dict)
    devices: dict[int, DeviceRow] = field(default_factory=dict)
    new_credentials: dict[int, CredentialRow] = field(default_factory=dict)
    credentials: dict[int, CredentialRow] = field(default_factory=dict)
    new_intents: dict[int, IntentRow] = field(default_factory=dict)
    intents: dict[int, IntentRow] = field(default_factory=dict)
    new_tokens: dict[str, TokenState] = field(default_factory=dict)
    tokens: dict[str, TokenState] = field(default_factory=dict)
    changes: list[Parameters] = field(default_factory=list)
    audit: list[Parameters] = field(default_factory=list)
    others: dict[UpdateBase, list[Parameters]] = field(default_factory=dict)
    counters: set[str] = field(default_factory=set)
    # For the cache of standings: devices, folded, that it must forget, and
    # credentials that it may as well learn.
    touched: set[str] = field(default_factory=set)
    learnt: dict[int, CredentialRow] = field(default_factory=dict)

    def nothing(self) -> bool:
        """Nothing is to be written; the newest time alone is not worth a commit."""
        return not (
            self.new_devices
            or self.devices
            or self.new_credentials
            or self.credentials
            or self.new_intents
            or self.intents
            or self.new_tokens
            or self.tokens
            or self.changes
            or self.audit
            or self.others
            or self.counters - {"newest"}
        )


class Operation(Protocol[T_co]):
    """One caller's wish: what it needs to know, and then what it does to the page.

    `apply` checks everything before it changes anything: when it raises PeerError
    the page is as it was.
    """

    def want(self, wants: Wants) -> None: ...

    def apply(self, page: Page) -> T_co: ...


class Page:
    """The rows at hand, and the work that a group does on them."""

    def __init__(self) -> None:
        self.counters: dict[str, int] = {}
        self.stored_counters: frozenset[str] = frozenset()
        self.known = Known()
        self.work = Work()

    def forget(self) -> None:
        """Somebody else wrote, or a transaction failed: know nothing."""
        self.known = Known()
        self.work = Work()

    def settled(self) -> None:
        """The work is on the disk; what is known stays."""
        self.work = Work()

    # Counters ------------------------------------------------------------------

    def next_number(self, counter: str) -> int:
        """The next number of a counter that only grows; holes are possible."""
        value = self.counters.get(counter, 0) + 1
        self.counters[counter] = value
        self.work.counters.add(counter)
        return value

    def saw(self, now: datetime) -> int:
        """Keep the newest time seen, and give it in microseconds."""
        at = to_us(now)
        if at > self.counters.get("newest", 0):
            self.counters["newest"] = at
            self.work.counters.add("newest")
        return at

    # Devices -------------------------------------------------------------------

    def device(self, device: DeviceId) -> DeviceRow | None:
        """The registered device of this ID or of one that differs only in case."""
        return self.known.devices[device.folded]

    def register(self, device: DeviceId, at: int) -> DeviceRow:
        """A new device; the caller has looked that there is none."""
        row = DeviceRow(
            self.next_number("row"), device, DeviceState.REGISTERED, None, at
        )
        self.known.devices[device.folded] = row
        self.known.device_rows[row.id] = row
        self.known.live[row.id] = []
        self.known.ended[row.id] = []
        self.known.generations[row.id] = 0
        self.work.new_devices[row.id] = row
        return row

    def device_changed(self, row: DeviceRow) -> None:
        """Write this device, and let nobody rely on what was known of it."""
        if row.id not in self.work.new_devices:
            self.work.devices[row.id] = row
        self.work.touched.add(row.device.folded)

    def device_of(self, row: CredentialRow) -> DeviceRow:
        """The device that a credential belongs to."""
        return self.known.device_rows[row.device]

    # Credentials ---------------------------------------------------------------

    def live(self, device: DeviceRow) -> list[CredentialRow]:
        """The pending and active credentials of a device, oldest first."""
        rows = [row for row in self.known.live[device.id] if row.state in LIVE]
        rows.sort(key=_BY_NUMBER)
        return rows

    def not_revoked(self, device: DeviceRow) -> list[CredentialRow]:
        """Every credential of a device but the revoked ones, oldest first."""
        families = self.known.ended[device.id], self.known.live[device.id]
        # One that ended since it was read is in both.
        rows = {row.id: row for family in families for row in family}
        return [
            row
            for row in sorted(rows.values(), key=_BY_NUMBER)
            if row.state is not CredentialState.REVOKED
        ]

    def add_credential(self, row: CredentialRow) -> None:
        """A new credential."""
        known = self.known
        known.credentials[row.id] = row
        if row.serial is not None:
            known.serials[row.serial] = row
        if row.request_key is not None:
            known.requests[row.request_key] = row
        if row.spki_sha256 in known.owners:
            known.owners[row.spki_sha256].add(row.device)
        if row.device in known.live:
            known.live[row.device].append(row)
        if row.generation is not None:
            known.generations[row.device] = row.generation
        self.work.new_credentials[row.id] = row
        self.work.learnt[row.id] = row

    def credential_changed(self, row: CredentialRow) -> None:
        """Write this credential, and let nobody rely on what was known of it."""
        row.seen = None
        if row.id not in self.work.new_credentials:
            self.work.credentials[row.id] = row
        self.work.touched.add(self.device_of(row).device.folded)

    # Intents and tokens -----------------------------------------------------------

    def add_intent(self, row: IntentRow) -> None:
        """A new, open intent."""
        known = self.known
        known.intents[row.id] = row
        known.open_requests[row.request_key] = row
        known.open_keys.setdefault(row.spki_sha256, []).append(row)
        self.work.new_intents[row.id] = row

    def resolve(self, row: IntentRow, how: str, at: int, why: str | None) -> None:
        """Write down what became of an intent; its request is no longer needed."""
        row.resolved, row.resolved_at, row.why, row.csr = how, at, why, None
        known = self.known
        if known.open_requests.get(row.request_key) is row:
            known.open_requests[row.request_key] = None
        rivals = known.open_keys.get(row.spki_sha256, ())
        known.open_keys[row.spki_sha256] = [
            other for other in rivals if other is not row
        ]
        if row.id not in self.work.new_intents:
            self.work.intents[row.id] = row

    def add_token(self, row: TokenState) -> None:
        """A new token."""
        self.known.tokens[row.hash] = row
        self.known.token_ids[row.id] = row
        self.work.new_tokens[row.id] = row

    def token_changed(self, row: TokenState) -> None:
        """Write this token."""
        if row.id not in self.work.new_tokens:
            self.work.tokens[row.id] = row

    # What others are told ---------------------------------------------------------

    def tell(
        self, kind: str, device: DeviceId | None, detail: Mapping[str, object], at: int
    ) -> int:
        """A change that running gateways follow; gives its number."""
        seq = self.next_number("change")
        self.work.changes.append(
            {
                "seq": seq,
                "kind": kind,
                "device": None if device is None else device.text,
                "detail": _json(detail),
                "at": at,
            }
        )
        return seq

    def record(
        self, event: str, fields: Mapping[str, object], at: int, actor: str
    ) -> None:
        """An audit event; raises KeyError for a name or field the table lacks."""
        events.check(event, fields)
        self.work.audit.append(
            {
                "id": self.next_number("row"),
                "at": at,
                "event": event,
                "actor": actor,
                "fields": _json(fields),
            }
        )

    def also(self, statement: UpdateBase, parameters: Parameters) -> None:
        """A write beside the rows; equal statements of a group go together."""
        self.work.others.setdefault(statement, []).append(parameters)


_BY_NUMBER = attrgetter("id")
_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True)


def _json(value: Mapping[str, object]) -> str:
    return _ENCODER.encode(dict(value))
