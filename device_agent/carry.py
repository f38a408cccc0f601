"""Carries out what the plan commands, and tells it what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from device_agent import keys, plan
from device_agent.failures import (
    Failure,
    NotNowError,
    RefusedError,
    UntrustedError,
)
from device_agent.slots import Meta, Pending, write_psk
from provisioning.model.credentials import CredentialKind
from provisioning.model.errors import PeerError, Unusable
from provisioning.model.ids import PskIdentity, Serial

if TYPE_CHECKING:
    from collections.abc import Callable

    from device_agent.dial import Dialer
    from device_agent.est import Gateway, WhoAmI
    from device_agent.home import Belonging, Home
    from provisioning.model.ids import DeviceId
    from provisioning.tls.context import ClientCertificate, ClientPsk


@dataclass(frozen=True, slots=True)
class FirstProof:
    """What admits a device that has nothing of ours yet.

    token: an enrolment token. credential: a factory or older certificate, or a PSK.
    """

    token: str | None = field(default=None, repr=False)
    credential: ClientCertificate | ClientPsk | None = None


class Carrier:
    """The shell around the plan. roll: gives 0 to 1, at random.

    failure: why the plan is where it is, if something went wrong since `failure` was
    last None; for the exit code and the sentence.
    """

    def __init__(  # noqa: PLR0913 - the composition of one run
        self,
        home: Home,
        belonging: Belonging,
        dialer: Dialer,
        roll: Callable[[], float],
        *,
        proof: FirstProof | None = None,
        tell: Callable[[plan.Tell], None] | None = None,
    ) -> None:
        self._home = home
        self._belonging = belonging
        self.dialer = dialer
        self._clock = dialer.clock
        self._roll = roll
        self._proof = proof
        self._tell = tell
        self.rule = belonging.rule
        self.failure: Failure | None = None

    async def drive(
        self, state: plan.State, commands: list[plan.Command]
    ) -> plan.State:
        """Carry out, step, and again, until the plan rests."""
        while True:
            event: plan.Event | None = None
            for command in commands:
                event = await self.carry(command)
                if event is not None:
                    break
            if event is None:
                return state
            state, commands = plan.step(state, event, self._clock.now())

    async def carry(self, command: plan.Command) -> plan.Event | None:
        """What came of a command; None where nothing can come of it but its doing."""
        try:
            return await self._do(command)
        except RefusedError as error:
            self.failure = error
            return plan.Refused(error.code, self._roll())
        except NotNowError as error:
            self.failure = error
            return plan.Failed(self._roll(), error.retry_after, error.handshake)
        except UntrustedError as error:
            self.failure = error
            return plan.Failed(self._roll())
        except Unusable as error:
            self.failure = error
            return plan.CouldNotSave(self._roll())
        except OSError as error:
            why = error.strerror or type(error).__name__
            self.failure = Unusable(str(self._home.folder), why)
            return plan.CouldNotSave(self._roll())

    async def look(self, held: plan.Held) -> plan.Told:
        """Ask the gateway how things stand with a credential. Raises the failures."""
        credential = self._home.slots.credential(held)
        async with self.dialer.gateway(self._belonging.gateway, credential) as gateway:
            me = await gateway.whoami()
            self._check(me, held)
            asked_at = self._clock.now()
            await self._learn(gateway)
        return plan.Told(me.rotate, asked_at, me.not_after, self.rule)

    async def _do(  # noqa: C901 - one case for each command
        self, command: plan.Command
    ) -> plan.Event | None:
        match command:
            case plan.MakeKeyAndCsr(slot, number):
                return self._prepare(slot, number)
            case plan.RequestFirst(slot):
                return await self._request_first(slot)
            case plan.RequestRenewal(old):
                return await self._request_renewal(old)
            case plan.Save(new, material):
                self._home.slots.keep(new, material, self._clock.now())
            case plan.ConnectWith(held):
                await self.look(held)
                self.failure = None
                return plan.Connected(self.rule)
            case plan.Look(held):
                return await self.look(held)
            case plan.Activate(held):
                self._home.slots.activate(held.slot)
                if held.not_before is not None:
                    self._clock.raise_to(held.not_before)
            case plan.Discard(slot):
                self._home.slots.discard(slot)
            case plan.Tell():
                if self._tell is not None:
                    self._tell(command)
        return None

    def _prepare(self, slot: plan.Slot, number: int) -> plan.Event:
        key_pem, request_der = keys.make_key_and_csr(self._belonging.device)
        meta = Meta(number, "cert", self._roll(), self._clock.now())
        self._home.slots.prepare(slot, meta, Pending(key_pem, request_der))
        return plan.Saved()

    async def _request_first(self, slot: plan.Slot) -> plan.Event:
        proof = self._proof
        if proof is None:
            why = "enrolment is half done; run `enroll` again with its token or file"
            raise Unusable(str(self._home.folder), why)
        request = self._home.slots.pending(slot).request_der
        login: tuple[DeviceId, str] | None = None
        if proof.token is not None:
            login = (self._belonging.device, proof.token)
        where = self._belonging.gateway
        async with self.dialer.gateway(where, proof.credential) as gateway:
            return self._issued(slot, await gateway.simple_enroll(request, login))

    async def _request_renewal(self, old: plan.Held) -> plan.Event:
        credential = self._home.slots.credential(old)
        where = self._belonging.gateway
        async with self.dialer.gateway(where, credential) as gateway:
            if old.kind is CredentialKind.PSK:
                return self._given(old, await gateway.next_psk())
            request = self._home.slots.pending(old.other_slot).request_der
            certificates = await gateway.simple_reenroll(request)
            return self._issued(old.other_slot, certificates)

    def _issued(self, slot: plan.Slot, certificates: list[bytes]) -> plan.Event:
        try:
            key_pem = self._home.slots.pending(slot).key_pem
            chain = keys.chain_of(certificates, key_pem)
            held, device = self._home.slots.received(slot, chain)
        except ValueError as error:
            text = f"the gateway's certificate is of no use here: {error}"
            raise NotNowError(text) from error
        if device != self._belonging.device.text:
            raise NotNowError("the gateway's certificate is for another device")
        return plan.Issued(held, chain)

    def _given(self, old: plan.Held, psk: ClientPsk) -> plan.Event:
        identity = PskIdentity.parse(psk.identity)
        if identity.device != self._belonging.device:
            raise NotNowError("the gateway's PSK is for another device")
        if psk.identity == old.identity:
            raise NotNowError("the gateway gave the PSK that this device has already")
        held = held_psk(psk, old.other_slot, old.number + 1, self._roll())
        return plan.Issued(held, write_psk(psk))

    async def _learn(self, gateway: Gateway) -> None:
        """Read the gateway's configuration; it may be away, the proof stands."""
        try:
            told = await gateway.config()
        except (NotNowError, RefusedError):
            return
        self.rule = told.rule
        try:
            self._home.learn(told.mqtts, told.rule)
            if told.time is not None and gateway.vouched_until is not None:
                # A gateway with a clock far ahead must not make its own certificate,
                # and the next ones, look expired for ever.
                self._clock.raise_to(min(told.time, gateway.vouched_until))
        except OSError:
            return  # a full disk does not unmake the proof

    def _check(self, me: WhoAmI, held: plan.Held) -> None:
        """Whether the gateway took us for who we are, by what we hold."""
        if me.auth is None:
            text = "the gateway did not take this device's credential"
            raise NotNowError(text, handshake=True)
        known = me.device == self._belonging.device.text
        if held.kind is CredentialKind.PSK:
            known = known and held.identity == f"{me.device}#{me.generation}"
        else:
            known = known and _same_serial(me.serial, held.serial)
        if not known:
            raise NotNowError("the gateway takes this device for another")


def held_psk(
    psk: ClientPsk,
    slot: plan.Slot,
    number: int,
    jitter: float,
) -> plan.Held:
    """A PSK as the plan sees it. Its beginning is known only to the slot's file."""
    return plan.Held(
        slot, number, CredentialKind.PSK, None, psk.identity, None, None, jitter
    )


def _same_serial(one: str | None, other: str | None) -> bool:
    try:
        return Serial.parse(one or "") == Serial.parse(other or "")
    except PeerError:
        return False
