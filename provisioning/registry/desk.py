"""The registry as operators, publishers and followers of changes use it."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from provisioning.model import events
from provisioning.model.credentials import DeviceState
from provisioning.registry import changes, reads
from provisioning.registry.orders import (
    AddAudit,
    AskRotate,
    CreateToken,
    MoveDevice,
    NextCrlNumber,
    Revoke,
    RevokeToken,
)
from provisioning.registry.proofs import NextPsk

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from provisioning.model.credentials import RevocationReason
    from provisioning.model.ids import DeviceId, Serial
    from provisioning.registry.changes import Change
    from provisioning.registry.gather import Reader
    from provisioning.registry.records import (
        AuditRow,
        CertStatus,
        DevicePage,
        DeviceView,
        OpenIntent,
        Revoked,
        TokenRow,
    )
    from provisioning.registry.writer import Writer

CRL_KEEPS = timedelta(days=1)
"""How long after its expiry a revoked certificate is still listed."""


class Desk:
    """Orders and questions that are not on any device's way."""

    _writer: Writer
    _reader: Reader

    # Devices ---------------------------------------------------------------------

    async def device(self, device: DeviceId) -> DeviceView | None:
        """One device with every credential it ever had; None if it is unknown."""
        async with self._reader.connection() as connection:
            return await reads.device(connection, device)

    async def list_devices(
        self,
        cursor: str | None = None,
        limit: int = 100,
        state: DeviceState | None = None,
        prefix: str | None = None,
    ) -> DevicePage:
        """Devices in the order of their IDs without case, those after the cursor."""
        async with self._reader.connection() as connection:
            return await reads.list_devices(connection, cursor, limit, state, prefix)

    async def revoke_device(
        self, device: DeviceId, reason: RevocationReason, now: datetime, actor: str
    ) -> Revoked:
        """End a device, its credentials, its open requests and its tokens.

        A second time revokes nothing more. Raises PeerError(device_unknown |
        device_id_case | state_not_allowed).
        """
        return await self._writer.run(Revoke(device, None, reason, now, actor))

    async def revoke_credential(
        self,
        device: DeviceId,
        serial: Serial,
        reason: RevocationReason,
        now: datetime,
        actor: str,
    ) -> Revoked:
        """End one certificate.

        Raises PeerError(device_unknown | device_id_case | credential_unknown).
        """
        return await self._writer.run(Revoke(device, serial, reason, now, actor))

    async def suspend(self, device: DeviceId, now: datetime, actor: str) -> int:
        """Enrolled to suspended; the number of the change.

        Raises PeerError(device_unknown | state_not_allowed), as its like do.
        """
        return await self._move(
            device, DeviceState.ENROLLED, DeviceState.SUSPENDED, now, actor
        )

    async def resume(self, device: DeviceId, now: datetime, actor: str) -> int:
        """Suspended to enrolled; the number of the change."""
        return await self._move(
            device, DeviceState.SUSPENDED, DeviceState.ENROLLED, now, actor
        )

    async def readmit(self, device: DeviceId, now: datetime, actor: str) -> int:
        """Revoked to registered: it may enrol anew; its old credentials stay ended."""
        return await self._move(
            device, DeviceState.REVOKED, DeviceState.REGISTERED, now, actor
        )

    async def ask_rotate(
        self, device: DeviceId, by: datetime, now: datetime, actor: str
    ) -> int:
        """Ask a device for a new credential until `by`; the number of the change."""
        return await self._writer.run(AskRotate(device, by, now, actor))

    async def create_psk(self, device: DeviceId, now: datetime, actor: str) -> int:
        """The generation to print: the unproven one, or the next.

        Registers the device if needed. Raises PeerError(device_revoked |
        device_retired | device_id_case).
        """
        return await self._writer.run(NextPsk(device, "operator", actor, now))

    async def _move(
        self,
        device: DeviceId,
        source: DeviceState,
        target: DeviceState,
        now: datetime,
        actor: str,
    ) -> int:
        event = _MOVES[source, target]
        return await self._writer.run(
            MoveDevice(device, source, target, event, now, actor)
        )

    # Tokens ----------------------------------------------------------------------

    async def create_token(  # noqa: PLR0913 - the columns of a token
        self,
        *,
        token_hash: bytes,
        device: DeviceId | None,
        uses: int,
        expires: datetime,
        profile: str | None,
        now: datetime,
        actor: str,
    ) -> TokenRow:
        """A new enrolment token; one for a named device registers that device.

        Raises PeerError(argument_malformed | device_revoked | device_retired |
        device_id_case).
        """
        return await self._writer.run(
            CreateToken(token_hash, device, uses, expires, profile, now, actor)
        )

    async def list_tokens(self) -> list[TokenRow]:
        """Every token, oldest first."""
        async with self._reader.connection() as connection:
            return await reads.list_tokens(connection)

    async def revoke_token(self, token_id: str, now: datetime, actor: str) -> None:
        """Nobody is let in by it any more. Raises PeerError(token_unknown)."""
        await self._writer.run(RevokeToken(token_id, now, actor))

    # Certificates for CRL and OCSP ---------------------------------------------------

    async def certificate_status(
        self, issuer: str, serial: Serial
    ) -> CertStatus | None:
        """What to answer about a certificate; None for one that was never issued."""
        async with self._reader.connection() as connection:
            return await reads.certificate_status(connection, issuer, serial)

    async def revoked(self, issuer: str, now: datetime) -> list[CertStatus]:
        """What a CRL lists: revoked, and not expired for longer than a day."""
        async with self._reader.connection() as connection:
            return await reads.revoked(connection, issuer, now, CRL_KEEPS)

    async def unexpired_serials(
        self, issuer: str, after_id: int, limit: int, now: datetime
    ) -> list[CertStatus]:
        """Certificates to sign answers for, revoked ones too, after a row's number."""
        async with self._reader.connection() as connection:
            return await reads.unexpired(connection, issuer, after_id, limit, now)

    async def next_crl_number(self, issuer: str) -> int:
        """Greater than any before it (RFC 5280, 5.2.3); a hole is possible."""
        return await self._writer.run(NextCrlNumber(issuer))

    # Intents, audit, time ----------------------------------------------------------

    async def unresolved_intents(
        self, older_than: datetime | None = None
    ) -> list[OpenIntent]:
        """Intents without an outcome, recorded before that time, oldest first."""
        async with self._reader.connection() as connection:
            return await reads.unresolved_intents(connection, older_than)

    async def add_audit(
        self, event: str, fields: Mapping[str, object], now: datetime, actor: str
    ) -> None:
        """An audit event that no other write here records."""
        await self._writer.run(AddAudit(event, fields, now, actor))

    async def audit_after(self, after_id: int = 0, limit: int = 100) -> list[AuditRow]:
        """Audit events in the order of their numbers."""
        async with self._reader.connection() as connection:
            return await reads.audit_after(connection, after_id, limit)

    async def newest_time(self) -> datetime | None:
        """The newest time that anything written carries; no clock may be behind it."""
        async with self._reader.connection() as connection:
            return await reads.newest_time(connection)

    # Changes -----------------------------------------------------------------------

    async def changes_after(self, seq: int, limit: int = 500) -> list[Change]:
        """The next changes after a number, in order."""
        async with self._reader.connection() as connection:
            return await changes.read_after(connection, seq, limit)

    async def latest_seq(self) -> int:
        """The newest change's number, 0 before the first."""
        async with self._reader.connection() as connection:
            return await changes.read_latest(connection)

    async def join_gateway(self, name: str, pid: int, now: datetime) -> int:
        """Be among those that changes wait for; an earlier one of that name is gone."""
        return await self._writer.run(changes.Join(name, pid, now))

    async def beat(self, gateway_id: int, applied_seq: int, now: datetime) -> None:
        """Say that this gateway is alive and has applied changes up to a number."""
        await self._writer.run(changes.Beat(gateway_id, applied_seq, now))

    async def leave(self, gateway_id: int) -> None:
        """Be waited for no longer."""
        await self._writer.run(changes.Leave(gateway_id))

    async def behind(
        self, seq: int, now: datetime, alive_within: timedelta
    ) -> list[str]:
        """The names of live gateways that have not applied a change yet."""
        async with self._reader.connection() as connection:
            return await changes.read_behind(connection, seq, now, alive_within)


_MOVES = {
    (DeviceState.ENROLLED, DeviceState.SUSPENDED): events.SUSPENDED,
    (DeviceState.SUSPENDED, DeviceState.ENROLLED): events.RESUMED,
    (DeviceState.REVOKED, DeviceState.REGISTERED): events.READMITTED,
}
