"""TLS without sockets: bytes in, events and bytes out, and how the peer proved itself.

    engine.receive(data) -> events      bytes from the peer, as they came
    engine.provide(identity, key)       the answer to `PskWanted`
    engine.send(data)                   plaintext for the peer
    engine.outgoing() -> bytes          what is to be written to the peer now

A server engine that needs a PSK gives `PskWanted` and holds the bytes back until
`provide`: a slow HSM delays that one handshake and nothing else.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from provisioning.model.credentials import CertificateProof, Proof, PskProof
from provisioning.model.ids import PskIdentity
from provisioning.tls import bindings, peek
from provisioning.tls.bindings import ffi, lib
from provisioning.tls.sessions import read_session

if TYPE_CHECKING:
    from provisioning.tls.context import ClientContext, ServerContext


@dataclass(frozen=True, slots=True)
class Established:
    """What a finished handshake says.

    bytes_up, bytes_down: TLS records from and to the client, handshake only.
    server_chain, staple: on the client's side.
    """

    version: str
    cipher: str
    group: str | None
    resumed: bool
    proof: Proof | None
    alpn: bytes | None
    bytes_up: int
    bytes_down: int
    server_chain: tuple[bytes, ...] = ()
    staple: bytes | None = None


@dataclass(frozen=True, slots=True)
class PskWanted:
    """The key of this identity is needed before the handshake can go on."""

    identity: PskIdentity


@dataclass(frozen=True, slots=True)
class Data:
    """Plaintext from the peer."""

    octets: bytes


@dataclass(frozen=True, slots=True)
class PeerClosed:
    """The peer sent `close_notify`: no more plaintext will come."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The connection is over; what `outgoing` still has is the alert.

    alert: the one that the peer sent, if it did. untrusted: why the peer's chain was
    not accepted, if that is what went wrong.
    """

    reason: str
    alert: str | None
    untrusted: str | None


Event = Established | PskWanted | Data | PeerClosed | Failed


class Engine:
    """One connection's TLS; `ServerEngine` and `ClientEngine` say who begins."""

    __slots__ = (
        "_context", "_flight", "_held", "_incoming", "_outgoing", "_reply", "_ssl",
        "bytes_in", "bytes_out", "choice", "closed", "established", "keys",
        "now", "offered", "speaks_13", "wanted",
    )  # fmt: skip

    def __init__(
        self, context: ServerContext | ClientContext, now: int, *, server: bool
    ) -> None:
        self._context = context
        self._ssl, self._incoming, self._outgoing = bindings.new_ssl(
            context.pointer, server=server
        )
        context.engines[bindings.key_of(self._ssl)] = self
        self.now = now
        """Seconds since 1970 when the connection began."""
        self.established: Established | None = None
        self.closed = False
        self.bytes_in = self.bytes_out = 0
        self.choice: peek.ServerChoice | None = None
        self._flight: peek.ClearFlight | None = peek.ClearFlight()
        self._reply: peek.ClearFlight | None = peek.ClearFlight()
        self._held: bytes | None = None
        self.keys: dict[bytes, bytes | None] = {}
        """Keys fetched for this handshake, by identity; gone when it is over."""
        self.offered: list[bytes] = []
        self.wanted: list[PskIdentity] = []
        self.speaks_13 = False

    # What the callbacks of a context ask
    def key_asked_for(self, identity: bytes) -> bytes | None:
        """The key that was provided for these octets; None is "not mine"."""
        return self.keys.get(identity)

    def is_away(self, identity: bytes) -> bool:
        """Whether this identity's key was wanted and the HSM could not give it."""
        return identity in self.keys and self.keys[identity] is None

    # What the shell does
    def receive(self, data: bytes) -> list[Event]:
        """Feed bytes from the peer; what they led to, in order."""
        if self.closed:
            return []
        self.bytes_in += len(data)
        if self.established is None:
            return self._handshake_bytes(data)
        lib.BIO_write(self._incoming, data, len(data))
        return self._read()

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt plaintext; nothing once the connection is closed."""
        if self.closed or self.established is None or not data:
            return
        view = memoryview(data)
        for at in range(0, len(view), bindings.SCRATCH):
            piece = ffi.from_buffer(view[at : at + bindings.SCRATCH])
            done, size = 0, len(piece)
            while done < size:
                # Partial writes are on: a call takes one record at most.
                wrote = lib.SSL_write(self._ssl, piece + done, size - done)
                if wrote <= 0:
                    bindings.drain_errors()
                    self._finish()
                    return
                done += wrote

    def outgoing(self) -> bytes:
        """Bytes for the peer; empty if there are none."""
        found = b""
        scratch = self._context.scratch
        while (size := lib.BIO_read(self._outgoing, scratch, bindings.SCRATCH)) > 0:
            found += bytes(ffi.buffer(scratch, size))
            if size < bindings.SCRATCH:
                break
        self.bytes_out += len(found)
        return found

    def close(self) -> None:
        """Say `close_notify`; nothing is read or sent any more."""
        if not self.closed:
            if self.established is not None:
                lib.SSL_shutdown(self._ssl)
                lib.ERR_clear_error()
            self._finish()

    def release(self) -> None:
        """Free what OpenSSL holds; the engine is not used after."""
        self.closed = True
        self._context.engines.pop(bindings.key_of(self._ssl), None)
        self.keys.clear()

    def export(self, label: bytes, length: int = 32) -> bytes:
        """Keying material of this connection (RFC 5705; RFC 8446, 7.5)."""
        return bindings.export_keying_material(self._ssl, label, length)

    # How it works
    def _handshake_bytes(self, data: bytes) -> list[Event]:
        lib.BIO_write(self._incoming, data, len(data))
        return self._drive()

    def _drive(self) -> list[Event]:
        lib.ERR_clear_error()
        result = lib.SSL_do_handshake(self._ssl)
        if result == 1:
            return self._done()
        code = lib.SSL_get_error(self._ssl, result)
        if code in (lib.SSL_ERROR_WANT_READ, lib.SSL_ERROR_WANT_WRITE):
            return []
        return [self._failed()]

    def _done(self) -> list[Event]:
        objection = self._objection()
        if objection is not None:
            self._finish()
            return [Failed(objection, None, None)]
        established = self._describe()
        self.established = established
        self._flight = self._reply = None
        self.keys.clear()
        self.offered.clear()
        return [established, *self._read()]

    def _describe(self) -> Established:
        raise NotImplementedError

    def _objection(self) -> str | None:
        """Why a finished handshake is not good enough; None if it is."""
        return None

    def _read(self) -> list[Event]:
        events: list[Event] = []
        scratch = self._context.scratch
        while True:
            size = lib.SSL_read(self._ssl, scratch, bindings.SCRATCH)
            if size > 0:
                events.append(Data(bytes(ffi.buffer(scratch, size))))
                continue
            code = lib.SSL_get_error(self._ssl, size)
            if code == lib.SSL_ERROR_ZERO_RETURN:
                events.append(PeerClosed())
            elif code not in (lib.SSL_ERROR_WANT_READ, lib.SSL_ERROR_WANT_WRITE):
                events.append(self._failed())
            return events

    def _failed(self) -> Failed:
        reason = bindings.drain_errors() or "the peer broke the connection off"
        untrusted = bindings.verify_error(self._ssl)
        self._finish()
        alert = None
        for mark in ("alert ", "tlsv13 alert "):
            if mark in reason:
                alert = reason.split(mark, 1)[1].replace(" ", "_")
        return Failed(reason, alert, untrusted)

    def _finish(self) -> None:
        self.closed = True
        self.keys.clear()
        self._held = None


class ServerEngine(Engine):
    """The gateway's side."""

    __slots__ = ()

    def __init__(self, context: ServerContext, now: int) -> None:
        super().__init__(context, now, server=True)

    @override
    def _handshake_bytes(self, data: bytes) -> list[Event]:
        if self._held is not None:
            # The shell stops reading while a key is awaited; what came all the same
            # is bounded by what one read can bring.
            self._held += data
            return []
        if self._flight is not None:
            messages = self._flight.feed(data)
            asked = peek.client_messages(messages, self.choice) if messages else []
            self.offered = asked or self.offered
            self.wanted = self._well_formed(asked)
            if self.wanted:
                self._held = data
                return [PskWanted(identity) for identity in self.wanted]
        return super()._handshake_bytes(data)

    def _well_formed(self, asked: list[bytes]) -> list[PskIdentity]:
        found: list[PskIdentity] = []
        for octets in asked:
            identity = PskIdentity.from_wire(octets)
            if identity is None or octets in self.keys or identity in found:
                continue
            if len(found) < peek.MAX_IDENTITIES:
                found.append(identity)
        return found

    def provide(self, identity: PskIdentity, key: bytes | None) -> list[Event]:
        """Answer `PskWanted`; the handshake goes on when all are answered.

        key: None while the HSM is away: the peer gets `internal_error`, which means
        "later" (DESIGN, When a part is away).
        """
        if self.closed or identity not in self.wanted:
            return []
        self.wanted.remove(identity)
        self.keys[identity.wire] = key
        if self.wanted:
            return []
        held, self._held = self._held or b"", None
        return super()._handshake_bytes(held)

    @override
    def outgoing(self) -> bytes:
        """Bytes for the peer; our ServerHello is read on its way out."""
        found = super().outgoing()
        if found and self._reply is not None:
            self.choice = peek.server_messages(self._reply.feed(found))
            if self.choice is not None:
                self._reply = None
                if not peek.identity_to_come(self.choice):
                    self._flight = None
        return found

    def channel_bindings(self) -> tuple[bytes, ...]:
        """What a CSR may prove possession by (RFC 7030, 3.5; RFC 9266).

        `tls-exporter`, and in TLS 1.2 `tls-unique` too.
        """
        if not self._has_extended_master_secret():
            return ()
        found = [self.export(b"EXPORTER-Channel-Binding")]
        if self.established and self.established.version == "TLSv1.2":
            found.append(
                bindings.tls_unique(
                    self._ssl, client_first=not self.established.resumed
                )
            )
        return tuple(found)

    @override
    def _objection(self) -> str | None:
        # RFC 7627, 5.3 and 5.4: what has no extended master secret is not resumed, nor
        # is a channel binding of it worth anything. Full handshakes without it go on:
        # strongSwan's TLS has none, and OpenSSL no setting that asks for it.
        if not self._has_extended_master_secret() and lib.SSL_session_reused(self._ssl):
            return "a session without extended master secret is not resumed"
        return None

    def _has_extended_master_secret(self) -> bool:
        if bindings.text(lib.SSL_get_version(self._ssl)) != "TLSv1.2":
            return True
        return bool(lib.SSL_get_extms_support(self._ssl) == 1)

    @override
    def _describe(self) -> Established:
        cipher, group = bindings.cipher_and_group(self._ssl)
        reused = bool(lib.SSL_session_reused(self._ssl))
        resumed = reused and not self._external_psk_taken()
        return Established(
            version=bindings.text(lib.SSL_get_version(self._ssl)),
            cipher=cipher,
            group=group,
            resumed=resumed,
            proof=self._proof(resumed=resumed),
            alpn=bindings.alpn(self._ssl),
            bytes_up=self.bytes_in,
            bytes_down=self.bytes_out,
        )

    def _external_psk_taken(self) -> bool:
        """OpenSSL calls an external PSK "reused" too (FACTS): the ServerHello tells."""
        taken = self.choice.selected_psk if self.choice else None
        if taken is None or taken >= len(self.offered):
            return False
        return self.keys.get(self.offered[taken]) is not None

    def _proof(self, *, resumed: bool) -> Proof | None:
        der = bindings.peer_certificate(self._ssl)
        if der is not None:
            return CertificateProof(der)
        session = read_session(bindings.session_der(self._ssl))
        if session is None or session.psk_identity is None:
            return None
        identity = PskIdentity.from_wire(session.psk_identity)
        # A full handshake by PSK used a key that was provided here, or it was none.
        if identity is None or not (resumed or self.keys.get(identity.wire)):
            return None
        return PskProof(identity)


class ClientEngine(Engine):
    """The agent's side.

    server_name: DNS name or IP address that the certificate must carry.
    session: bytes of an earlier `session()`, to resume.
    """

    __slots__ = ("_offers_session",)

    def __init__(
        self,
        context: ClientContext,
        now: int,
        *,
        server_name: str,
        session: bytes | None = None,
    ) -> None:
        super().__init__(context, now, server=False)
        try:
            address = ipaddress.ip_address(server_name).packed
        except ValueError:
            address = None
        if context.verified:
            bindings.expect_server(self._ssl, server_name, address)
        if context.verify_at is not None:
            bindings.verify_as_of(self._ssl, int(context.verify_at.timestamp()))
        if context.ask_staple:
            lib.SSL_set_tlsext_status_type(self._ssl, bindings.STATUS_TYPE_OCSP)
        self._offers_session = session is not None and bindings.set_session(
            self._ssl, session
        )

    def start(self) -> list[Event]:
        """Put the ClientHello into `outgoing`."""
        return self._drive()

    def session(self) -> bytes | None:
        """The newest session that can be resumed, as bytes; a secret."""
        der = bindings.session_der(self._ssl)
        facts = read_session(der)
        return der if facts and facts.has_ticket else None

    @override
    def _handshake_bytes(self, data: bytes) -> list[Event]:
        if self._reply is not None:
            self.choice = peek.server_messages(self._reply.feed(data))
            if self.choice is not None:
                self._reply = None
        return super()._handshake_bytes(data)

    @override
    def _describe(self) -> Established:
        cipher, group = bindings.cipher_and_group(self._ssl)
        resumed = self._offers_session and bool(lib.SSL_session_reused(self._ssl))
        if self.choice is not None and self.choice.version == peek.TLS13:
            # The session is the first identity offered, the external PSK the second.
            resumed = resumed and self.choice.selected_psk == 0
        chain = bindings.peer_chain(self._ssl)
        return Established(
            version=bindings.text(lib.SSL_get_version(self._ssl)),
            cipher=cipher,
            group=group,
            resumed=resumed,
            proof=None,
            alpn=bindings.alpn(self._ssl),
            bytes_up=self.bytes_out,
            bytes_down=self.bytes_in,
            server_chain=chain,
            staple=bindings.received_staple(self._ssl),
        )
