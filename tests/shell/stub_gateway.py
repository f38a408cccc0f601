"""A small gateway for the agent's tests: real TLS, no HSM, no registry, told to err.

It keeps to DESIGN where the agent could tell: a new credential ends the old one at its
second connection, the same request is answered alike, unknown credentials are refused
in words. The real gateway meets the agent in tests/story and in the acceptance suite.
"""

from __future__ import annotations

import asyncio
import base64
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import h11
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from provisioning.model import refusals
from provisioning.model.credentials import CertificateProof, PskProof
from provisioning.model.ids import DeviceId, PskIdentity, Serial
from provisioning.tls.aio import server_transport
from provisioning.tls.context import ServerContext
from provisioning.wire import est, mqtt
from provisioning.wire.problems import problem, problem_body

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from provisioning.tls.aio import TlsTransport

DER, PEM = serialization.Encoding.DER, serialization.Encoding.PEM


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


class Authority:
    """A root, and what it signs."""

    def __init__(self, name: str = "Stub Root") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(_name(name))
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=3650))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), False
            )
            .sign(self.key, hashes.SHA256())
        )
        self.pem = self.certificate.public_bytes(PEM)
        self.der = self.certificate.public_bytes(DER)

    def sign(
        self,
        subject: x509.Name,
        public_key: Any,
        *,
        server: bool = False,
        lifetime: timedelta = timedelta(days=30),
    ) -> x509.Certificate:
        """A leaf for a server on localhost, or for a device."""
        now = datetime.now(UTC)
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else _client_auth()
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + lifetime)
            .add_extension(x509.ExtendedKeyUsage([usage]), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(
                    self.key.public_key()
                ),
                False,
            )
        )
        if server:
            names = [
                x509.DNSName("localhost"),
                x509.IPAddress(ip_address("127.0.0.1")),
            ]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        return builder.sign(self.key, hashes.SHA256())


def _client_auth() -> x509.ObjectIdentifier:
    return ExtendedKeyUsageOID.CLIENT_AUTH


@dataclass
class Record:
    """One credential as the stub knows it; key: serial or PSK identity."""

    name: str
    device: str
    connections: int = 0
    gone: refusals.Refusal | None = None


@dataclass
class StubGateway:
    """What tests set and look at."""

    authority: Authority
    tokens: dict[str, str] = field(default_factory=dict)
    psks: dict[str, bytes] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    answers: dict[bytes, bytes] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    secrets_seen: list[str] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    refuse: dict[str, refusals.Refusal] = field(default_factory=dict)
    wishes: set[str] = field(default_factory=set)
    lifetime: timedelta = timedelta(days=30)
    with_mqtt: bool = True
    ahead: timedelta = timedelta(0)
    https_port: int = 0
    mqtts_port: int = 0
    resumed: list[bool] = field(default_factory=list)
    links: list[MqttSide] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    transports: set[TlsTransport] = field(default_factory=set)

    @property
    def url(self) -> str:
        """What `--gateway` takes."""
        return f"https://localhost:{self.https_port}"

    # Admittance of the TLS transport
    handshake_deadline_s = 10.0

    def arrived(self, transport: TlsTransport) -> None:
        self.transports.add(transport)

    def begins(self, transport: TlsTransport) -> bool:
        return True

    def ended(self, transport: TlsTransport, failed: object) -> None:
        pass

    def lost(self, transport: TlsTransport) -> None:
        self.transports.discard(transport)

    def cached_key(self, identity: PskIdentity) -> bytes | None:
        return self.psks.get(str(identity), b"\1" * 32)

    def fetch_key(self, transport: TlsTransport, identity: PskIdentity) -> None:
        transport.provide_key(identity, self.cached_key(identity))

    # What it knows
    def note(self, what: str) -> None:
        self.seen.append(what)
        self.changed.set()

    async def until(self, condition: Any) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    def make_psk(self, device: str) -> tuple[str, bytes]:
        generations = [
            PskIdentity.parse(name).generation
            for name in self.psks
            if name.partition("#")[0] == device
        ]
        newest = max(generations, default=0)
        record = self.records.get(f"{device}#{newest}")
        if record is not None and not record.connections:
            return record.name, self.psks[record.name]
        identity = f"{device}#{newest + 1}"
        self.psks[identity] = hashes_of(identity)
        self.records[identity] = Record(identity, device)
        return identity, self.psks[identity]

    def proven(self, transport: TlsTransport) -> Record | None:
        """Who connected; counts the connection once."""
        established = transport.established
        assert established is not None
        self.resumed.append(established.resumed)
        match established.proof:
            case CertificateProof(der):
                serial = Serial(x509.load_der_x509_certificate(der).serial_number).hex
                record = self.records.get(serial)
            case PskProof(identity):
                record = self.records.get(str(identity))
            case _:
                return None
        if record is None:
            return Record("?", "?", gone=refusals.CREDENTIAL_UNKNOWN)
        if record.gone is None:
            record.connections += 1
            if record.connections == 1 and "#" not in record.name:
                return record
            if record.connections >= 2:
                self.supersede(record)
        return record

    def supersede(self, by: Record) -> None:
        for other in self.records.values():
            older = list(self.records).index(other.name) < list(self.records).index(
                by.name
            )
            same_line = ("#" in other.name) == ("#" in by.name)
            if other.device == by.device and older and same_line:
                if other.gone is None:
                    self.wishes.discard(by.device)
                other.gone = refusals.CREDENTIAL_SUPERSEDED
        self.changed.set()

    def issue(self, device: str, request_der: bytes, proof: str) -> bytes:
        key = proof.encode() + request_der
        if key not in self.answers:
            request = x509.load_der_x509_csr(request_der)
            assert request.is_signature_valid
            names = [
                x509.NameAttribute(NameOID.SERIAL_NUMBER, device),
                x509.NameAttribute(NameOID.COMMON_NAME, device),
            ]
            leaf = self.authority.sign(
                x509.Name(names), request.public_key(), lifetime=self.lifetime
            )
            serial = Serial(leaf.serial_number).hex
            self.records[serial] = Record(serial, device)
            self.answers[key] = est.encode_body(
                est.certs_only([leaf.public_bytes(DER)])
            )
        return self.answers[key]


def hashes_of(identity: str) -> bytes:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(identity.encode())
    return digest.finalize()


class HttpSide(asyncio.Protocol):
    """One HTTPS connection of the stub."""

    def __init__(self, stub: StubGateway) -> None:
        self._stub = stub
        self._machine = h11.Connection(h11.SERVER)
        self._request: h11.Request | None = None
        self._body = b""
        self._record: Record | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._record = self._stub.proven(transport)

    def data_received(self, data: bytes) -> None:
        self._machine.receive_data(data)
        while True:
            event = self._machine.next_event()
            if isinstance(event, h11.Request):
                self._request, self._body = event, b""
            elif isinstance(event, h11.Data):
                self._body += event.data
            elif isinstance(event, h11.EndOfMessage):
                self._respond()
                if self._machine.our_state is h11.DONE:
                    self._machine.start_next_cycle()
            else:
                return

    def _respond(self) -> None:
        assert self._request is not None
        path = self._request.target.decode()
        operation = path.rsplit("/", 1)[-1]
        self._stub.note(operation)
        refusal = self._stub.refuse.get(operation)
        headers = [("Content-Type", "application/json")]
        try:
            status, body = 200, self._answer(operation, refusal)
        except RefuseError as refused:
            status = refused.refusal.http
            body = problem_body(problem(refused.refusal))
            if refused.refusal.retryable:
                headers.append(("Retry-After", "1"))
        headers.append(("Content-Length", str(len(body))))
        self._send(h11.Response(status_code=status, headers=headers))
        self._send(h11.Data(data=body))
        self._send(h11.EndOfMessage())

    def _answer(  # noqa: PLR0911 - one return for each operation
        self, operation: str, refusal: refusals.Refusal | None
    ) -> bytes:
        if refusal is not None:
            raise RefuseError(refusal)
        stub, record = self._stub, self._record
        if operation == "cacerts":
            return est.encode_body(est.certs_only([stub.authority.der]))
        if operation == "simpleenroll":
            device, proof = self._proof()
            return stub.issue(device, est.decode_body(self._body).der, proof)
        if operation == "whoami" and record is None:
            return json.dumps({"device": None, "auth": None}).encode()
        if record is None:
            raise RefuseError(refusals.CREDENTIAL_MISSING)
        if record.gone is not None:
            raise RefuseError(record.gone)
        if operation == "simplereenroll":
            return stub.issue(
                record.device, est.decode_body(self._body).der, record.name
            )
        if operation == "psk":
            identity, key = stub.make_psk(record.device)
            return json.dumps({"identity": identity, "key": key.hex()}).encode()
        if operation == "whoami":
            return self._whoami(record)
        mqtts = f"mqtts://localhost:{stub.mqtts_port}" if stub.with_mqtt else None
        endpoints = {"https": stub.url, "mqtts": mqtts, "coaps": None}
        told = {
            "device": record.device,
            "endpoints": endpoints,
            "renew": {"at": 0.667, "jitter": 0.05},
            "time": (datetime.now(UTC) + stub.ahead).isoformat(),
        }
        return json.dumps(told).encode()

    def _whoami(self, record: Record) -> bytes:
        is_psk = "#" in record.name
        told = {
            "device": record.device,
            "auth": "psk" if is_psk else "certificate",
            "serial": None if is_psk else record.name,
            "generation": int(record.name.partition("#")[2]) if is_psk else None,
            "not_after": None,
            "rotate": record.device in self._stub.wishes,
        }
        return json.dumps(told).encode()

    def _proof(self) -> tuple[str, str]:
        assert self._request is not None
        for name, value in self._request.headers:
            if name == b"authorization":
                login = base64.b64decode(value.split()[1]).decode()
                self._stub.secrets_seen.append(login)
                device, _, token = login.partition(":")
                if self._stub.tokens.get(token) != device:
                    raise RefuseError(refusals.TOKEN_REFUSED)
                return device, token
        if self._record is None:
            raise RefuseError(refusals.CREDENTIAL_MISSING)
        if self._record.gone is not None:
            raise RefuseError(self._record.gone)
        return self._record.device, self._record.name

    def _send(self, event: Any) -> None:
        self._transport.write(self._machine.send(event) or b"")


class RefuseError(Exception):
    def __init__(self, refusal: refusals.Refusal) -> None:
        super().__init__(refusal.code)
        self.refusal = refusal


class MqttSide(asyncio.Protocol):
    """One MQTT connection of the stub, broker included."""

    def __init__(self, stub: StubGateway) -> None:
        self._stub = stub
        self._splitter = mqtt.Splitter(65_536)
        self.record: Record | None = None
        self.client_id = ""
        self.subscribed = False
        self.alive = True

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self.record = self._stub.proven(transport)

    def connection_lost(self, _exc: Exception | None) -> None:
        self.alive = False
        self._stub.changed.set()

    def data_received(self, data: bytes) -> None:
        self._splitter.receive_data(data)
        while (packet := self._splitter.next_packet()) is not None:
            self._packet(packet)

    def send(self, octets: bytes) -> None:
        self._transport.write(octets)

    def notify(self, by: str) -> None:
        assert self.record is not None
        payload = {"action": "rotate", "by": by, "campaign": None}
        self.send(
            mqtt.build_publish(
                f"devices/{self.record.device}/down/credential",
                json.dumps(payload).encode(),
                level=mqtt.V5,
                qos=1,
                packet_id=7,
            )
        )

    def cut(self) -> None:
        self._transport.abort()

    def _packet(self, packet: bytes) -> None:
        match mqtt.kind_of(packet):
            case mqtt.Kind.CONNECT:
                connect = mqtt.Connect.parse(packet)
                self.client_id = connect.client_id
                refusal = self.record.gone if self.record else None
                code = refusal.mqtt5 if refusal else 0
                self.send(mqtt.Connack(code).encode(mqtt.V5))
                self._stub.links.append(self)
                self._stub.note(f"mqtt {connect.client_id} clean={connect.clean}")
            case mqtt.Kind.SUBSCRIBE:
                number = mqtt.packet_id_of(packet)
                self.send(mqtt.Suback(number, b"\1").encode(mqtt.V5))
                self.subscribed = True
                self._stub.changed.set()
            case mqtt.Kind.PUBLISH:
                message = mqtt.Publish.parse(packet, mqtt.V5)
                told = json.loads(packet[message.payload_at :])
                self._stub.notes.append({"topic": message.topic, **told})
                assert message.packet_id is not None
                ack = mqtt.Ack(mqtt.Kind.PUBACK, message.packet_id)
                self.send(ack.encode(mqtt.V5))
                self._stub.changed.set()
            case mqtt.Kind.PINGREQ:
                self.send(mqtt.PINGRESP)


@asynccontextmanager
async def serving(
    authority: Authority | None = None,
    certificate_from: Authority | None = None,
    lifetime: timedelta = timedelta(days=30),
) -> AsyncIterator[StubGateway]:
    """A stub that listens.

    certificate_from: who signs its server certificate; lifetime: that one's.
    """
    stub = StubGateway(authority or Authority())
    key = ec.generate_private_key(ec.SECP256R1())
    signer = certificate_from or stub.authority
    leaf = signer.sign(
        _name("localhost"), key.public_key(), server=True, lifetime=lifetime
    )
    key_pem = key.private_bytes(
        PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    loop = asyncio.get_running_loop()

    def context(alpn: bytes) -> ServerContext:
        return ServerContext(
            chain_pem=leaf.public_bytes(PEM),
            key_pem=key_pem,
            client_anchors=[stub.authority.certificate],
            alpn=alpn,
            staple=lambda: None,
        )

    http, broker = context(b"http/1.1"), context(b"mqtt")
    servers = [
        await loop.create_server(
            lambda: server_transport(http, lambda: HttpSide(stub), stub),
            "localhost",
            stub.https_port,
        ),
        await loop.create_server(
            lambda: server_transport(broker, lambda: MqttSide(stub), stub),
            "localhost",
            stub.mqtts_port,
        ),
    ]
    stub.https_port = servers[0].sockets[0].getsockname()[1]
    stub.mqtts_port = servers[1].sockets[0].getsockname()[1]
    try:
        yield stub
    finally:
        for server in servers:
            server.close()
        for transport in list(stub.transports):
            transport.abort()


def device_id(text: str) -> DeviceId:
    return DeviceId.parse(text)
