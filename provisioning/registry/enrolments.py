"""Operations of an enrolment: admit, finish, void. Pure: they see only the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import bindparam, update

from provisioning.model import events
from provisioning.model.credentials import (
    CredentialKind,
    CredentialState,
    DeviceState,
    move_credential,
)
from provisioning.model.errors import OutcomeUnknown, PeerError
from provisioning.model.refusals import DEVICE_ID_CASE, DEVICE_RETIRED, DEVICE_REVOKED
from provisioning.registry.records import Earlier, Facts, NewIntent, Repeat
from provisioning.registry.rows import CredentialRow, IntentRow, standing
from provisioning.registry.schema import end_to_us, from_us, to_us, tokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from provisioning.model.credentials import Credential
    from provisioning.model.ids import DeviceId, Serial
    from provisioning.registry.page import Page, Wants
    from provisioning.registry.records import Ask, Decision
    from provisioning.registry.rows import DeviceRow

_GIVE_BACK = (
    update(tokens)
    .where(tokens.c.id == bindparam("key"), tokens.c.used > 0)
    .values(used=tokens.c.used - 1)
)

GONE = {
    DeviceState.REVOKED: DEVICE_REVOKED,
    DeviceState.RETIRED: DEVICE_RETIRED,
}
"""Devices that get nothing new, and what they are told."""


@dataclass(slots=True)
class Admit:
    """Gather the facts of an ask, let `decide` judge, record a new intent.

    recorded: the intent that was put on the page, in case the answer is lost.
    """

    ask: Ask
    decide: Callable[[Facts], Decision]
    recorded: NewIntent | None = None

    def want(self, wants: Wants) -> None:
        ask = self.ask
        if ask.device is not None:
            wants.devices.add(ask.device.folded)
        if ask.token_hash is not None:
            wants.token_hashes.add(ask.token_hash)
        if ask.credential_id is not None:
            wants.credentials.add(ask.credential_id)
        wants.spkis.add(ask.spki_sha256)
        wants.requests.add(ask.request_key)

    def apply(self, page: Page) -> Decision:
        decision = self.decide(facts(page, self.ask))
        if isinstance(decision, Repeat):
            return decision
        intent = decision
        at = page.saw(intent.created_at)
        device = page.device(intent.device)
        if device is not None and device.device != intent.device:
            raise PeerError(DEVICE_ID_CASE)
        if device is None:
            device = page.register(intent.device, at)
        intent.id = page.next_number("row")
        self.recorded = intent
        page.add_intent(_intent_row(intent, device, at))
        if intent.token_id is not None and self.ask.token_hash is not None:
            token = page.known.tokens[self.ask.token_hash]
            if token is not None:
                token.used += 1
                page.token_changed(token)
        return intent


@dataclass(frozen=True, slots=True)
class Finish:
    """The certificate exists: record it, and only then may it be released.

    The same certificate may be recorded twice: an answer was lost.
    """

    intent: NewIntent
    certificate: bytes
    now: datetime

    def want(self, wants: Wants) -> None:
        wants.finished.add(self.intent.id)
        wants.live.add(self.intent.device.folded)

    def apply(self, page: Page) -> Credential:
        intent = page.known.intents[self.intent.id]
        device = page.device(self.intent.device)
        if device is None or intent is None or intent.serial != self.intent.serial:
            raise OutcomeUnknown(self._name())
        if intent.resolved == "issued":
            return self._again(page, device)
        if intent.resolved is not None:
            # Somebody decided that it came to nothing, and a retry may already have
            # led to another certificate: this one must not be released.
            if device.state in GONE:
                raise PeerError(GONE[device.state])
            raise OutcomeUnknown(self._name())
        at = page.saw(self.now)
        page.resolve(intent, "issued", at, None)
        for older in page.live(device):
            if older.line == intent.line and older.state is CredentialState.PENDING:
                supersede(page, older, device, "newer", at)
        row = self._row(intent, at)
        page.add_credential(row)
        serial = intent.serial.hex
        page.tell(
            "issued",
            device.device,
            {"id": row.id, "serial": serial, "issuer": intent.issuer},
            at,
        )
        credential = row.seen_as(device.device)
        page.record(
            events.ISSUED,
            {
                "device": device.device.text,
                "profile": intent.profile,
                "serial": serial,
                "auth": intent.auth,
                "not_after": _text(credential.not_after),
            },
            at,
            f"device {device.device.text}",
        )
        return credential

    def _again(self, page: Page, device: DeviceRow) -> Credential:
        row = page.known.credentials[self.intent.id]
        if row is None or row.certificate != self.certificate:
            raise OutcomeUnknown(self._name())
        return row.seen_as(device.device)

    def _name(self) -> str:
        return f"intent {self.intent.id}"

    def _row(self, intent: IntentRow, at: int) -> CredentialRow:
        return CredentialRow(
            id=intent.id,
            device=intent.device,
            kind=CredentialKind.CERTIFICATE,
            line=intent.line,
            state=CredentialState.PENDING,
            serial=intent.serial,
            generation=None,
            issuer=intent.issuer,
            not_before=intent.not_before,
            not_after=intent.not_after,
            spki_sha256=intent.spki_sha256,
            request_key=intent.request_key,
            first_seen=None,
            connections=0,
            ends_at=None,
            revoked_at=None,
            reason=None,
            created_at=at,
            certificate=self.certificate,
        )


@dataclass(frozen=True, slots=True)
class Void:
    """Nothing came of an intent, or nobody knows: its certificate is never released.

    serial: when given, the intent must have it: after a commit in doubt, the same
    number may belong to another. Gives whether there was something to void.
    """

    intent_id: int
    why: str
    now: datetime
    serial: Serial | None = None

    def want(self, wants: Wants) -> None:
        wants.intents.add(self.intent_id)

    def apply(self, page: Page) -> bool:
        intent = page.known.intents[self.intent_id]
        if intent is None or intent.resolved is not None:
            return False
        if self.serial is not None and self.serial != intent.serial:
            return False
        void(page, intent, self.why, page.saw(self.now))
        return True


def facts(page: Page, ask: Ask) -> Facts:
    """What the page knows about an ask."""
    known = page.known
    held = None
    if ask.credential_id is not None:
        row = known.credentials[ask.credential_id]
        held = None if row is None else standing(row, page.device_of(row))
    name = ask.device or (None if held is None else held.credential.device)
    device = None if name is None else page.device(name)
    twin = device is not None and device.device != name
    token = None
    if ask.token_hash is not None:
        found = known.tokens[ask.token_hash]
        if found is not None:
            bound = None if found.device is None else known.device_rows[found.device]
            token = found.seen_as(None if bound is None else bound.device)
    return Facts(
        token=token,
        standing=held,
        device_state=None if device is None or twin else device.state,
        case_twin=device.device.text if device is not None and twin else None,
        spki_owner=_owner(page, ask, None if twin else device),
        earlier=_earlier(page, ask),
    )


def supersede(
    page: Page, row: CredentialRow, device: DeviceRow, by: str, at: int
) -> None:
    """A newer credential took this one's place. by: what ended it, for the audit."""
    row.state = move_credential(row.state, CredentialState.SUPERSEDED)
    page.credential_changed(row)
    told = {
        "serial": None if row.serial is None else row.serial.hex,
        "generation": row.generation,
    }
    page.tell(
        "credential", device.device, {"id": row.id, **told, "state": row.state}, at
    )
    page.record(
        events.SUPERSEDED,
        {"device": device.device.text, **told, "by": by},
        at,
        f"device {device.device.text}",
    )


def void(page: Page, intent: IntentRow, why: str, at: int) -> None:
    """Resolve an open intent as void, and give its token's use back."""
    page.resolve(intent, "void", at, why)
    if intent.token is not None:
        _give_back(page, intent.token)
    device = page.known.device_rows[intent.device].device
    page.record(
        events.INTENT_VOIDED,
        {"device": device.text, "serial": intent.serial.hex, "why": why},
        at,
        "gateway",
    )


def _give_back(page: Page, token_id: str) -> None:
    token = page.known.token_ids.get(token_id)
    if token is None:
        # Not at hand, so nobody in this group counts its uses.
        page.also(_GIVE_BACK, {"key": token_id})
    elif token.used > 0:
        token.used -= 1
        page.token_changed(token)


def _owner(page: Page, ask: Ask, asker: DeviceRow | None) -> DeviceId | None:
    key = ask.spki_sha256
    owners = page.known.owners[key]
    rivals = page.known.open_keys[key]
    if not owners and not rivals:
        return None
    for number in (*owners, *(intent.device for intent in rivals)):
        if asker is None or number != asker.id:
            return page.known.device_rows[number].device
    return None


def _earlier(page: Page, ask: Ask) -> Earlier | None:
    issued = page.known.requests[ask.request_key]
    if issued is not None and issued.state is not CredentialState.PENDING:
        issued = None  # proven since: the same request is a new one
    unresolved = page.known.open_requests[ask.request_key]
    if unresolved is not None and (issued is None or unresolved.id > issued.id):
        return unresolved.earlier()
    if issued is None:
        return None
    device = page.device_of(issued)
    return Earlier(
        intent_id=issued.id,
        resolved=True,
        certificate_der=issued.certificate,
        credential=issued.seen_as(device.device),
        at=from_us(issued.created_at),
    )


def _intent_row(intent: NewIntent, device: DeviceRow, at: int) -> IntentRow:
    return IntentRow(
        id=intent.id,
        request_key=intent.request_key,
        device=device.id,
        line=intent.line,
        profile=intent.profile,
        issuer=intent.issuer,
        serial=intent.serial,
        not_before=to_us(intent.not_before),
        not_after=end_to_us(intent.not_after),
        spki_sha256=intent.spki_sha256,
        token=intent.token_id,
        auth=intent.auth.value,
        created_at=at,
        csr=intent.csr_der,
    )


def _text(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()
