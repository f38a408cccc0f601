"""A device asks: it is admitted and issued to, or answered again; every protocol's."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from typing import TYPE_CHECKING

from provisioning.ca.issue import Signing, issue
from provisioning.enrol.admission import (
    AskedBefore,
    DeadIntentError,
    EnrolmentProof,
    Operation,
    Request,
    StandingProof,
    TokenProof,
    admit,
    named_profile,
    standing_refusal,
)
from provisioning.enrol.policy import DEFAULT_PROFILE, EnrolmentPolicy
from provisioning.model.credentials import AuthMethod, CredentialKind
from provisioning.model.errors import OutcomeUnknown, PeerError, Unavailable
from provisioning.model.events import ISSUED, PSK_ISSUED, REPEATED
from provisioning.model.ids import PskIdentity, Serial
from provisioning.model.refusals import CHANNEL_BINDING_WRONG
from provisioning.psk.derive import PskKey, derive
from provisioning.registry.records import Ask, Decision, Facts, NewIntent, Repeat
from provisioning.x509.csr import KeyRules, VerifiedCsr, verify_csr
from provisioning.x509.profiles import validity

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Coroutine, Mapping
    from datetime import datetime

    from provisioning.ca.hierarchy import Hierarchy
    from provisioning.hsm.token import Token
    from provisioning.model.admitted import Admitted
    from provisioning.model.credentials import Credential, Standing
    from provisioning.registry.store import Registry


class Enrolment:
    """Answers enrolment requests, whichever protocol carried them.

    tasks: owns the work, which goes on when the device that asked has gone: its
    retry then finds the answer. random_bytes: as `secrets.token_bytes`.
    on_event: told what happened, in the words of model/events.py.
    """

    def __init__(  # noqa: PLR0913 - the parts it joins, each by its name
        self,
        *,
        registry: Registry,
        token: Token,
        hierarchy: Hierarchy,
        policy: EnrolmentPolicy,
        clock: Callable[[], datetime],
        random_bytes: Callable[[int], bytes],
        tasks: asyncio.TaskGroup,
        on_event: Callable[[str, Mapping[str, object]], None] | None = None,
    ) -> None:
        self._registry = registry
        self._token = token
        self._hierarchy = hierarchy
        self._policy = policy
        self._clock = clock
        self._random_bytes = random_bytes
        self._tasks = tasks
        self._tell = on_event or _tell_nobody
        self._signing = Signing(registry, token, hierarchy, policy.profiles, clock)
        # A request under way in this process, by its key. Owned by the loop's thread.
        self._running: dict[bytes, asyncio.Future[bytes]] = {}
        # Requests whose intent may be recorded, and nobody signs for it.
        self._doubtful: set[bytes] = set()
        self._token_rules = _widest(policy)

    async def simple_enroll(
        self,
        csr_der: bytes,
        proof: EnrolmentProof,
        profile: str | None = None,
        *,
        bindings: Callable[[], tuple[str, ...]] | None = None,
    ) -> bytes:
        """EST simpleenroll (RFC 7030, 4.2.1): the certificate's DER.

        profile: the label of the path. bindings: what the connection's channel
        bindings are, asked for when the request carries one (RFC 7030, 3.5).
        Raises PeerError, Unavailable (the same request may be sent again), Unusable.
        """
        return await self._ask(
            Operation.SIMPLE_ENROLL, csr_der, proof, profile, bindings
        )

    async def simple_reenroll(
        self,
        csr_der: bytes,
        standing: Standing,
        profile: str | None = None,
        *,
        bindings: Callable[[], tuple[str, ...]] | None = None,
    ) -> bytes:
        """EST simplereenroll (RFC 7030, 4.2.2) of the credential that TLS has shown.

        It may be expired within its profile's `expired_grace`. As `simple_enroll`.
        """
        return await self._ask(
            Operation.SIMPLE_REENROLL,
            csr_der,
            StandingProof(standing),
            profile,
            bindings,
        )

    async def next_psk(
        self, standing: Standing, auth: AuthMethod
    ) -> tuple[PskIdentity, PskKey]:
        """The device's next generation; the same one until it is proven.

        Raises PeerError for a credential or device that may not, Unavailable.
        """
        now = self._clock()
        refusal = standing_refusal(standing, now)
        if refusal is not None:
            raise PeerError(refusal)
        device = standing.credential.device
        try:
            generation = await self._registry.next_psk(device, now, auth)
        except OutcomeUnknown:
            # If it was written, asking again gives the same generation.
            raise Unavailable("registry") from None
        identity = PskIdentity(device, generation)
        key = await derive(self._token, identity)
        self._tell(
            PSK_ISSUED,
            {"device": device.text, "generation": generation, "auth": auth.value},
        )
        return identity, key

    # The one way to a certificate ------------------------------------------------

    async def _ask(
        self,
        operation: Operation,
        csr_der: bytes,
        proof: EnrolmentProof,
        profile: str | None,
        bindings: Callable[[], tuple[str, ...]] | None,
    ) -> bytes:
        line = profile or _default_line(operation, proof)
        csr = verify_csr(csr_der, self._rules(line, profile, proof))
        _check_binding(csr, bindings)
        key = request_key(operation, line, proof, csr.fingerprint)
        running = self._running.get(key)
        if running is None:
            running = asyncio.get_running_loop().create_future()
            work = self._answer(key, Request(operation, csr, profile), proof, line)
            self._start(key, running, work)
        # Whoever waits may be cut off; the work and its other waiters go on.
        return await asyncio.shield(running)

    def _start(
        self,
        key: bytes,
        running: asyncio.Future[bytes],
        work: Coroutine[object, object, bytes],
    ) -> None:
        self._running[key] = running
        carried = self._carry(key, running, work)
        try:
            self._tasks.create_task(carried)
        except RuntimeError:  # the group is closing: the gateway is about to stop
            del self._running[key]
            carried.close()
            work.close()
            raise Unavailable("the gateway") from None

    async def _carry(
        self,
        key: bytes,
        running: asyncio.Future[bytes],
        work: Coroutine[object, object, bytes],
    ) -> None:
        """The task around one request: whoever waits for it gets what it ended with."""
        try:
            running.set_result(await work)
        except OutcomeUnknown:
            # Whether the registry wrote it is found out when the device asks again,
            # with the same request: it is the key to what was written.
            running.set_exception(Unavailable("registry"))
        except asyncio.CancelledError:
            running.set_exception(Unavailable("the gateway"))
            raise
        except Exception as error:  # noqa: BLE001 - a task's outermost shell; it is
            running.set_exception(error)  # raised again where the answer is awaited
        finally:
            del self._running[key]

    async def _answer(
        self, key: bytes, request: Request, proof: EnrolmentProof, line: str
    ) -> bytes:
        try:
            return await self._admit(key, request, proof, line)
        except DeadIntentError as dead:
            why = "begun, and its end was never recorded"
            await self._registry.void(dead.intent_id, why, self._clock())
            self._signing.abandoned.discard(dead.intent_id)
        return await self._admit(key, request, proof, line)

    async def _admit(
        self, key: bytes, request: Request, proof: EnrolmentProof, line: str
    ) -> bytes:
        now = self._clock()
        csr = request.csr
        admitted: Admitted | None = None

        def decide(facts: Facts) -> Decision:
            nonlocal admitted
            verdict = admit(
                request,
                proof,
                facts,
                self._policy,
                now,
                abandoned=self._abandoned(key, facts),
            )
            if isinstance(verdict, AskedBefore):
                return Repeat(verdict.credential, verdict.certificate_der)
            admitted = verdict
            return self._intend(key, verdict, csr, facts, now)

        ask = _registry_ask(key, csr, proof, line, now)
        try:
            decision = await self._registry.admit(ask, decide)
        except OutcomeUnknown:
            self._doubtful.add(key)
            raise
        self._doubtful.discard(key)
        if isinstance(decision, Repeat):
            self._tell(REPEATED, _told(decision.credential))
            return decision.certificate_der
        if admitted is None:
            message = "the registry decided without asking"
            raise AssertionError(message)
        der = await issue(admitted, csr, decision, self._signing)
        self._tell(
            ISSUED,
            {
                "device": admitted.device.text,
                "profile": admitted.profile,
                "serial": decision.serial.hex,
                "auth": admitted.auth.value,
                "not_after": decision.not_after,
            },
        )
        return der

    def _abandoned(self, key: bytes, facts: Facts) -> Container[int]:
        """Intents that this process gave up, or began without learning their number."""
        if key in self._doubtful and facts.earlier is not None:
            return (facts.earlier.intent_id,)
        return self._signing.abandoned

    def _intend(
        self,
        key: bytes,
        admitted: Admitted,
        csr: VerifiedCsr,
        facts: Facts,
        now: datetime,
    ) -> NewIntent:
        profile = named_profile(admitted.profile, self._policy)
        if admitted.auth is AuthMethod.TOKEN and profile.keys != self._token_rules:
            # Only now is it known what the token is for: judge the key by that.
            verify_csr(csr.der, profile.keys)
        issuer = self._hierarchy.issuers[profile.issuer]
        not_before, not_after = validity(profile, now, issuer.not_after)
        return NewIntent(
            request_key=key,
            device=admitted.device,
            line=profile.name,
            profile=profile.name,
            issuer=issuer.name,
            serial=Serial.from_random(self._random_bytes(16)),
            not_before=not_before,
            not_after=not_after,
            spki_sha256=csr.spki_sha256,
            csr_der=csr.der,
            token_id=None if facts.token is None else facts.token.id,
            auth=admitted.auth,
            created_at=now,
        )

    def _rules(self, line: str, profile: str | None, proof: EnrolmentProof) -> KeyRules:
        if profile is None and isinstance(proof, TokenProof):
            return self._token_rules
        return named_profile(line, self._policy).keys


def request_key(
    operation: Operation, line: str, proof: EnrolmentProof, fingerprint: bytes
) -> bytes:
    """What makes two requests the same: operation, proof and CSR (SHA-256 of them).

    Every part has a fixed length or ends in a zero octet, so none runs into another.
    """
    what = f"{operation.value}\0{line}\0".encode()
    return hashlib.sha256(what + fingerprint + _who(proof)).digest()


def _who(proof: EnrolmentProof) -> bytes:
    match proof:
        case TokenProof(token_hash, device):
            return b"token\0" + token_hash + device.text.encode("ascii")
        case StandingProof(standing):
            return b"credential\0" + standing.credential.id.to_bytes(8)


def _default_line(operation: Operation, proof: EnrolmentProof) -> str:
    if operation is Operation.SIMPLE_REENROLL and isinstance(proof, StandingProof):
        credential = proof.standing.credential
        if credential.kind is CredentialKind.CERTIFICATE:
            return credential.line
    return DEFAULT_PROFILE


def _registry_ask(
    key: bytes, csr: VerifiedCsr, proof: EnrolmentProof, line: str, now: datetime
) -> Ask:
    return Ask(
        request_key=key,
        device=proof.device,
        token_hash=proof.token_hash if isinstance(proof, TokenProof) else None,
        credential_id=(
            proof.standing.credential.id if isinstance(proof, StandingProof) else None
        ),
        spki_sha256=csr.spki_sha256,
        line=line,
        now=now,
    )


def _check_binding(
    csr: VerifiedCsr, bindings: Callable[[], tuple[str, ...]] | None
) -> None:
    """RFC 7030, 3.5: optional for the client; when it is there, it must be right.

    `tls-unique` ended with TLS 1.2; `tls-exporter` takes its place (RFC 9266).
    """
    password = csr.wishes.challenge_password
    if password is None:
        return
    said = password.encode()
    if not any(
        hmac.compare_digest(said, one.encode()) for one in (bindings or tuple)()
    ):
        raise PeerError(CHANNEL_BINDING_WRONG)


def _widest(policy: EnrolmentPolicy) -> KeyRules:
    """What keys a token might admit: any that one of the profiles for tokens takes."""
    rules = [one.keys for one in policy.profiles.values() if one.token]
    sizes = [one.rsa_min_bits for one in rules if one.rsa_min_bits is not None]
    return KeyRules(
        curves=frozenset().union(*(one.curves for one in rules)),
        rsa_min_bits=min(sizes, default=None),
        rsa_max_bits=max((one.rsa_max_bits for one in rules), default=4096),
    )


def _told(credential: Credential) -> dict[str, object]:
    return {
        "device": credential.device.text,
        "profile": credential.line,
        "serial": None if credential.serial is None else credential.serial.hex,
    }


def _tell_nobody(_name: str, _fields: Mapping[str, object]) -> None:
    return
