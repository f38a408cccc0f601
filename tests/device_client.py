"""A device that says exactly what a test wants: HTTPS and MQTT over our own TLS."""

from __future__ import annotations

import asyncio
import base64
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from provisioning.tls.aio import Stream, open_stream
from provisioning.tls.context import ClientCertificate, ClientContext, ClientPsk
from provisioning.wire import est
from provisioning.wire.mqtt import V5, Connack, Connect, Splitter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway_process import GatewayProcess

WHOAMI = "/device/v1/whoami"
EST = "/.well-known/est"
HTTP = (b"http/1.1",)
MQTT = (b"mqtt",)
TLS12 = 0x0303


@dataclass(frozen=True)
class Answer:
    """One HTTP answer. No status: the connection ended instead."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The refusal's code; the whole answer where it is none, to be read."""
        if self.status < 400:
            return f"not refused: {self.status} {self.body[:200]!r}"
        return str(self.document["code"])


NOTHING = Answer(0)


class Https:
    """HTTP/1.1 over one stream, one request after the other."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._buffer = b""

    async def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> Answer:
        """A request and its answer; header names with `_` for `-`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            named |= {"Content-Length": str(len(body))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Accept: application/problem+json\r\n{lines}\r\n"
        return await self.say(head.encode("latin-1") + (body or b""))

    async def say(self, octets: bytes) -> Answer:
        """Anything, and what is answered; NOTHING when the connection ends."""
        try:
            await self.stream.write(octets)
            return await self.hear()
        except ConnectionError:
            return NOTHING

    async def hear(self) -> Answer:
        """The next answer that is not a mere `100 Continue`."""
        while True:
            while b"\r\n\r\n" not in self._buffer:
                if not await self._more():
                    return NOTHING
            head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
            first, *rest = head.decode("latin-1").split("\r\n")
            status = int(first.split()[1])
            if status >= 200:
                break
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in rest)
        }
        size = int(headers.get("content-length", 0))
        while len(self._buffer) < size:
            if not await self._more():
                return NOTHING
        body, self._buffer = self._buffer[:size], self._buffer[size:]
        return Answer(status, headers, body)

    async def _more(self) -> bool:
        data = await self.stream.read()
        self._buffer += data
        return bool(data)

    async def whoami(self) -> Answer:
        return await self.ask("GET", WHOAMI)

    async def enroll(
        self,
        der: bytes,
        *,
        basic: tuple[str, str] | None = None,
        operation: str = "simpleenroll",
        profile: str | None = None,
    ) -> Answer:
        """EST; basic: device ID and token."""
        headers = {"Content_Type": est.PKCS10_TYPE}
        if basic is not None:
            pair = base64.b64encode(":".join(basic).encode()).decode()
            headers["Authorization"] = f"Basic {pair}"
        label = f"/{profile}" if profile else ""
        body = est.encode_body(der)
        return await self.ask("POST", f"{EST}{label}/{operation}", body, **headers)

    async def ended(self, within: float = 5.0) -> bytes:
        """Wait until the gateway has ended the connection; what still came."""
        found = self._buffer
        async with asyncio.timeout(within):
            while data := await self.stream.read():
                found += data
        return found


class Mqtt:
    """One MQTT client."""

    def __init__(self, stream: Stream, level: int = V5) -> None:
        self.stream = stream
        self.level = level
        self._splitter = Splitter(1 << 20)

    async def connect(self, client_id: str = "") -> Connack:
        await self.stream.write(Connect(client_id, self.level).encode())
        packet = await self.hear()
        assert packet is not None
        return Connack.parse(packet, self.level)

    async def hear(self) -> bytes | None:
        """The next packet; None when the connection has ended."""
        while (packet := self._splitter.next_packet()) is None:
            data = await self.stream.read()
            if not data:
                return None
            self._splitter.receive_data(data)
        return packet


def make_csr(name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """DER of a request as a device makes it."""
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.SERIAL_NUMBER, name),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def issued(answer: Answer) -> x509.Certificate:
    """The certificate of an EST answer, which must be one."""
    assert answer.status == 200, (answer.status, answer.body)
    (der,) = est.read_certs_only(est.decode_body(answer.body).der)
    return x509.load_der_x509_certificate(der)


@dataclass
class Device:
    """A key and the newest certificate for it."""

    name: str
    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )
    certificate: x509.Certificate | None = None

    @property
    def csr(self) -> bytes:
        return make_csr(self.name, self.key)

    @property
    def serial(self) -> str:
        assert self.certificate is not None
        return f"{self.certificate.serial_number:x}"

    @property
    def proof(self) -> ClientCertificate:
        assert self.certificate is not None
        return ClientCertificate(
            self.certificate.public_bytes(serialization.Encoding.PEM),
            self.key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )


class Field:
    """Where devices are: connections to one gateway, and devices that it knows."""

    def __init__(self, gateway: GatewayProcess) -> None:
        self.gateway = gateway
        root = x509.load_der_x509_certificate(gateway.certificate("root").read_bytes())
        self.anchors = root.public_bytes(serialization.Encoding.PEM)

    async def dial(
        self,
        proof: ClientCertificate | ClientPsk | None = None,
        *,
        listener: str = "https",
        session: bytes | None = None,
        newest: str = "TLSv1.3",
    ) -> Stream:
        """A verified connection. newest: the newest version that is offered."""
        context = ClientContext(
            anchors_pem=self.anchors,
            credential=proof,
            alpn=MQTT if listener == "mqtts" else HTTP,
        )
        if newest == "TLSv1.2":
            context._public.set_max_proto_version(TLS12)
        port = self.gateway.ready[listener]
        return await open_stream(
            "127.0.0.1", port, context, server_name="localhost", session=session
        )

    @asynccontextmanager
    async def https(
        self, proof: ClientCertificate | ClientPsk | None = None, **how: Any
    ) -> AsyncIterator[Https]:
        stream = await self.dial(proof, **how)
        try:
            yield Https(stream)
        finally:
            await stream.close()

    @asynccontextmanager
    async def mqtt(
        self,
        proof: ClientCertificate | ClientPsk | None = None,
        *,
        level: int = V5,
        **how: Any,
    ) -> AsyncIterator[Mqtt]:
        stream = await self.dial(proof, listener="mqtts", **how)
        try:
            yield Mqtt(stream, level)
        finally:
            await stream.close()

    async def whoami(self, proof: Any = None, **how: Any) -> Answer:
        """On a connection of its own."""
        async with self.https(proof, **how) as http:
            return await http.whoami()

    async def enrolled(self, name: str, *, profile: str | None = None) -> Device:
        """A new device, by token."""
        device = Device(name)
        token = await self.gateway.token(name, profile=profile)
        async with self.https() as http:
            answer = await http.enroll(device.csr, basic=(name, token))
        device.certificate = issued(answer)
        return device

    async def renewed(self, device: Device, **how: Any) -> Device:
        """The same device with its next certificate, for a new key."""
        following = Device(device.name)
        async with self.https(device.proof) as http:
            answer = await http.enroll(following.csr, operation="simplereenroll", **how)
        following.certificate = issued(answer)
        return following

    async def psk_of(self, proof: ClientCertificate | ClientPsk) -> ClientPsk:
        """The device's next PSK."""
        async with self.https(proof) as http:
            answer = await http.ask("POST", "/device/v1/psk", b"")
        assert answer.status == 200, answer.body
        return ClientPsk(
            answer.document["identity"], bytes.fromhex(answer.document["key"])
        )
