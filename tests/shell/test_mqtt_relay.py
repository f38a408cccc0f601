"""The relay between a raw device and a real mosquitto."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from typing_extensions import override

from gateway.mqtt.broker import BrokerAddress, Mosquitto
from gateway.mqtt.relay import MqttLimits, MqttPeer, Relay, RelayParts
from provisioning.model.errors import PeerError, Unavailable
from provisioning.model.ids import DeviceId
from provisioning.model.refusals import (
    CREDENTIAL_MISSING,
    DEVICE_REVOKED,
    PACKET_MALFORMED,
    TOPIC_NOT_ALLOWED,
)
from provisioning.wire.mqtt import (
    PINGREQ,
    PINGRESP,
    V5,
    V311,
    Ack,
    Connack,
    Connect,
    Farewell,
    Kind,
    Prop,
    Publish,
    Splitter,
    Suback,
    Subscribe,
    Will,
    build_publish,
    number_of,
    read_reason_text,
    text_of,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

PUMP = DeviceId.parse("pump-7")
LEVELS = pytest.mark.parametrize("level", [V311, V5], ids=["3.1.1", "5"])


def small_socket() -> socket.socket:
    """A TCP socket in which the kernel keeps little, so that buffers show."""
    sock = socket.socket()
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, 16_384)
    return sock


class Device:
    """A client that says exactly what a test wants, and reads when it is told to."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.splitter = Splitter(1 << 24)
        self.level = V5

    def say(self, *packets: bytes) -> None:
        self.writer.write(b"".join(packets))

    async def hear(self) -> bytes | None:
        """The next packet; None when the connection has ended."""
        while (packet := self.splitter.next_packet()) is None:
            try:
                data = await self.reader.read(65_536)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self.splitter.receive_data(data)
        return packet

    async def connect(self, level: int = V5, **more: Any) -> Connack:
        self.level = level
        self.say(Connect(more.pop("client_id", ""), level, **more).encode())
        packet = await self.hear()
        assert packet is not None
        return Connack.parse(packet, level)

    async def subscribe(self, *filters: str, packet_id: int = 1) -> bytes:
        asked = tuple((name, 1) for name in filters)
        self.say(Subscribe(packet_id, asked).encode(self.level))
        packet = await self.hear()
        assert packet is not None
        return Suback.parse(packet, self.level).codes

    async def goodbye(self) -> Farewell:
        packet = await self.hear()
        assert packet is not None
        assert packet[0] >> 4 == Kind.DISCONNECT
        return Farewell.parse(packet, self.level)


@dataclass
class Gateway:
    """A listener of relays, without TLS, whose devices are who `admit` says."""

    address: BrokerAddress
    port: int = 0
    limits: MqttLimits = field(default_factory=MqttLimits)
    peer: DeviceId = PUMP
    relays: list[Relay] = field(default_factory=list)
    tasks: asyncio.TaskGroup = field(default_factory=asyncio.TaskGroup)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    names: dict[str, Relay] = field(default_factory=dict)
    refusal: Exception | None = None
    admit_by: Callable[[asyncio.Transport], Awaitable[MqttPeer]] | None = None
    on_open: Callable[[Relay, DeviceId], None] | None = None
    admitting: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def admit(self, transport: asyncio.Transport) -> MqttPeer:
        if self.admit_by is not None:
            return await self.admit_by(transport)
        await self.admitting.wait()
        if self.refusal is not None:
            raise self.refusal
        return MqttPeer(self.peer)

    def opened(self, relay: Relay, device: DeviceId) -> None:
        if self.on_open is not None:
            self.on_open(relay, device)
        self.relays.append(relay)

    def gone(self, relay: Relay, _device: DeviceId) -> None:
        self.relays.remove(relay)
        self.closed.set()

    def protocol(self) -> Relay:
        return Relay(
            RelayParts(
                admit=self.admit,
                connect_broker=self.address.connect,
                on_open=self.opened,
                on_close=self.gone,
                spawn=self.tasks.create_task,
                on_event=lambda name, fields: self.events.append((name, dict(fields))),
                limits=self.limits,
                names=self.names,
            )
        )

    @asynccontextmanager
    async def device(self) -> AsyncIterator[Device]:
        sock = small_socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=sock)
        try:
            yield Device(reader, writer)
        finally:
            writer.transport.abort()


@asynccontextmanager
async def listening(address: BrokerAddress) -> AsyncIterator[Gateway]:
    gateway = Gateway(address)
    gateway.admitting.set()
    loop = asyncio.get_running_loop()
    sock = small_socket()
    sock.bind(("127.0.0.1", 0))
    server = await loop.create_server(gateway.protocol, sock=sock)
    gateway.port = sock.getsockname()[1]
    async with gateway.tasks:
        yield gateway
        server.close()
        for relay in list(gateway.relays):
            relay.shut_down()


@pytest.fixture
async def mosquitto(tmp_path: Path) -> AsyncIterator[Mosquitto]:
    broker = Mosquitto(tmp_path)
    task = asyncio.create_task(broker.run())
    await broker.ready()
    yield broker
    task.cancel()
    await asyncio.wait([task])


@pytest.fixture
async def gateway(mosquitto: Mosquitto) -> AsyncIterator[Gateway]:
    async with listening(mosquitto.address) as made:
        yield made


class Application(asyncio.Protocol):
    """Somebody behind the gateway, straight on the broker."""

    def __init__(self) -> None:
        self.splitter = Splitter(1 << 24)
        self.heard: asyncio.Queue[bytes] = asyncio.Queue()
        self.drained = asyncio.Event()
        self.drained.set()

    @override
    def data_received(self, data: bytes) -> None:
        self.splitter.receive_data(data)
        while (packet := self.splitter.next_packet()) is not None:
            self.heard.put_nowait(packet)

    @override
    def pause_writing(self) -> None:
        self.drained.clear()

    @override
    def resume_writing(self) -> None:
        self.drained.set()


@asynccontextmanager
async def application(
    address: BrokerAddress, *filters: str
) -> AsyncIterator[tuple[asyncio.Transport, Application]]:
    transport, protocol = await address.connect(Application)
    assert isinstance(protocol, Application)
    transport.write(Connect("an-application", V311).encode())
    assert (await protocol.heard.get())[0] >> 4 == Kind.CONNACK
    if filters:
        asked = tuple((name, 1) for name in filters)
        transport.write(Subscribe(1, asked).encode(V311))
        assert (await protocol.heard.get())[0] >> 4 == Kind.SUBACK
    yield transport, protocol
    transport.abort()


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until it is so; the test's own deadline ends a vain wait."""
    while True:
        if condition():
            return
        await asyncio.sleep(0.005)


@LEVELS
async def test_a_device_publishes_and_receives_below_its_branch(
    gateway: Gateway, level: int
) -> None:
    async with application(gateway.address, "devices/#") as (app, heard):
        async with gateway.device() as device:
            assert (await device.connect(level)).code == 0
            assert await device.subscribe("devices/pump-7/down/#") == b"\x01"
            device.say(
                build_publish(
                    "devices/pump-7/up/t", b"21.5", level=level, qos=1, packet_id=9
                )
            )
            packet = await device.hear()
            assert packet == Ack(Kind.PUBACK, 9).encode(level)
            up = await heard.heard.get()
            publish = Publish.parse(up, V311)
            assert (publish.topic, up[publish.payload_at :]) == (
                "devices/pump-7/up/t",
                b"21.5",
            )
            app.write(build_publish("devices/pump-7/down/x", b"on", level=V311))
            down = await device.hear()
            assert down is not None
            assert Publish.parse(down, level).topic == "devices/pump-7/down/x"
            device.say(PINGREQ)
            assert await device.hear() == PINGRESP
            device.say(Farewell().encode(level))
            assert await device.hear() is None
        await gateway.closed.wait()


async def test_a_v5_device_without_a_name_is_told_the_one_it_has(
    gateway: Gateway,
) -> None:
    async with gateway.device() as device:
        connack = await device.connect()
        assert text_of(connack.properties, Prop.ASSIGNED_CLIENT_ID) == "pump-7"
        largest = number_of(connack.properties, Prop.MAXIMUM_PACKET_SIZE)
        assert largest == gateway.limits.max_packet_bytes


@pytest.mark.parametrize("name", ["other", "pump-7:", "pump-7:a b", "PUMP-7"])
@LEVELS
async def test_another_client_identifier_is_refused(
    gateway: Gateway, level: int, name: str
) -> None:
    async with gateway.device() as device:
        connack = await device.connect(level, client_id=name)
        assert connack.code == (0x85 if level == V5 else 2)
        assert await device.hear() is None


async def test_agent_and_application_stay_both(gateway: Gateway) -> None:
    async with gateway.device() as one, gateway.device() as two:
        assert (await one.connect(client_id="pump-7")).code == 0
        assert (await two.connect(client_id="pump-7:agent")).code == 0
        for device in (one, two):
            device.say(PINGREQ)
            assert await device.hear() == PINGRESP


async def test_a_second_connection_of_the_same_name_ends_the_first(
    gateway: Gateway,
) -> None:
    async with gateway.device() as one, gateway.device() as two:
        await one.connect()
        await two.connect()
        assert (await one.goodbye()).code == 0x8E
        assert await one.hear() is None


@LEVELS
async def test_a_will_of_others_is_refused_at_connect(
    gateway: Gateway, level: int
) -> None:
    async with gateway.device() as device:
        will = Will("devices/pump-8/up/t", b"gone")
        connack = await device.connect(level, will=will)
        assert connack.code == (0x87 if level == V5 else 5)


async def test_a_will_of_its_own_is_published_when_the_device_is_lost(
    gateway: Gateway,
) -> None:
    async with application(gateway.address, "devices/pump-7/up/#") as (_, heard):
        async with gateway.device() as device:
            await device.connect(will=Will("devices/pump-7/up/gone", b"?"))
        packet = await heard.heard.get()
        assert Publish.parse(packet, V311).topic == "devices/pump-7/up/gone"


async def test_a_v5_publication_elsewhere_is_refused_and_the_rest_goes_on(
    gateway: Gateway,
) -> None:
    async with (
        application(gateway.address, "devices/#") as (_, heard),
        gateway.device() as device,
    ):
        await device.connect()
        for qos, kind in ((1, Kind.PUBACK), (2, Kind.PUBREC)):
            device.say(
                build_publish(
                    "devices/pump-8/up/t", b"x", level=V5, qos=qos, packet_id=4
                )
            )
            packet = await device.hear()
            assert packet is not None
            ack = Ack.parse(packet, V5)
            assert (ack.kind, ack.packet_id, ack.code) == (kind, 4, 0x87)
            reason = text_of(ack.properties, Prop.REASON_STRING)
            assert reason is not None
            assert read_reason_text(reason) is TOPIC_NOT_ALLOWED
        # The broker never met identifier 4: it is free for what is allowed.
        device.say(
            build_publish("devices/pump-7/up/t", b"y", level=V5, qos=2, packet_id=4)
        )
        packet = await device.hear()
        assert packet == Ack(Kind.PUBREC, 4).encode(V5)
        device.say(Ack(Kind.PUBREL, 4).encode(V5))
        assert await device.hear() == Ack(Kind.PUBCOMP, 4).encode(V5)
        up = await heard.heard.get()
        assert Publish.parse(up, V311).topic == "devices/pump-7/up/t"


@pytest.mark.parametrize("qos", [0, 1])
@LEVELS
async def test_where_no_refusal_exists_a_publication_elsewhere_ends_the_connection(
    gateway: Gateway, level: int, qos: int
) -> None:
    async with (
        application(gateway.address, "devices/#") as (app, heard),
        gateway.device() as device,
    ):
        await device.connect(level)
        device.say(
            build_publish("devices/pump-7/up/a", b"", level=level),
            build_publish(
                "devices/pump-8/up/t",
                b"x",
                level=level,
                qos=qos,
                packet_id=1 if qos else None,
            ),
        )
        if level == V5 and qos == 0:
            assert (await device.goodbye()).code == 0x87
        refused = await device.hear()
        assert (refused is None) == (level == V311 or qos == 0)
        app.write(build_publish("devices/last", b"", level=V311))
        topics = []
        while "devices/last" not in topics:
            topics.append(Publish.parse(await heard.heard.get(), V311).topic)
        assert topics == ["devices/pump-7/up/a", "devices/last"]


@LEVELS
async def test_each_filter_of_a_subscribe_is_judged_for_itself(
    gateway: Gateway, level: int
) -> None:
    no = 0x87 if level == V5 else 0x80
    async with application(gateway.address) as (app, _), gateway.device() as device:
        await device.connect(level)
        codes = await device.subscribe(
            "devices/pump-8/down/#",
            "devices/pump-7/down/a",
            "#",
            "$SYS/#",
            "$share/g/devices/pump-7/down/b",
            "$share/g/devices/+/down/b",
        )
        assert codes == bytes((no, 1, no, no, 1, no))
        assert await device.subscribe("#", packet_id=2) == bytes((no,))
        for topic in ("pump-8/down/a", "pump-7/down/c", "pump-7/down/b"):
            app.write(build_publish(f"devices/{topic}", b"", level=V311))
        packet = await device.hear()
        assert packet is not None
        assert Publish.parse(packet, level).topic == "devices/pump-7/down/b"


async def test_topic_aliases_are_judged_by_what_they_mean(gateway: Gateway) -> None:
    def by_alias(topic: str, alias: int, packet_id: int) -> bytes:
        return build_publish(
            topic,
            b"",
            level=V5,
            qos=1,
            packet_id=packet_id,
            properties=((Prop.TOPIC_ALIAS, alias),),
        )

    async with (
        application(gateway.address, "devices/#") as (_, heard),
        gateway.device() as device,
    ):
        connack = await device.connect()
        assert number_of(connack.properties, Prop.TOPIC_ALIAS_MAXIMUM) == 8
        codes = []
        for number, topic in enumerate(
            ["devices/pump-7/up/a", "", "devices/pump-8/up/a", ""], 1
        ):
            device.say(by_alias(topic, 1, number))
            packet = await device.hear()
            assert packet is not None
            codes.append(Ack.parse(packet, V5).code)
        assert codes == [0, 0, 0x87, 0x87]
        for _ in range(2):
            up = await heard.heard.get()
            assert Publish.parse(up, V311).topic == "devices/pump-7/up/a"
        device.say(by_alias("devices/pump-7/up/a", 9, 5))
        assert (await device.goodbye()).code == 0x82


@pytest.mark.parametrize(
    ("refusal", "codes"),
    [
        (PeerError(CREDENTIAL_MISSING), (5, 0x87)),
        (PeerError(DEVICE_REVOKED), (5, 0x87)),
        (Unavailable("the registry"), (3, 0x88)),
        (RuntimeError("a bug"), (3, 0x88)),
    ],
)
@LEVELS
async def test_who_may_not_come_in_is_told_in_the_connack(
    gateway: Gateway, level: int, refusal: Exception, codes: tuple[int, int]
) -> None:
    gateway.refusal = refusal
    async with gateway.device() as device:
        connack = await device.connect(level)
        assert connack.code == codes[level == V5]
        if level == V5:
            reason = text_of(connack.properties, Prop.REASON_STRING)
            assert reason is not None
            assert "bug" not in reason
            if isinstance(refusal, PeerError):
                assert read_reason_text(reason) is refusal.refusal
        assert await device.hear() is None


@LEVELS
async def test_a_broker_that_is_away_is_server_unavailable(
    tmp_path: Path, level: int
) -> None:
    nowhere = BrokerAddress(path=str(tmp_path / "nothing"))
    async with listening(nowhere) as gateway, gateway.device() as device:
        connack = await device.connect(level)
        assert connack.code == (0x88 if level == V5 else 3)


async def test_a_broker_that_says_nothing_is_server_unavailable(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "mute")
    server = await asyncio.get_running_loop().create_unix_server(asyncio.Protocol, path)
    async with server, listening(BrokerAddress(path=path)) as gateway:
        gateway.limits = MqttLimits(broker_s=0.05)
        async with gateway.device() as device:
            assert (await device.connect()).code == 0x88
            assert await device.hear() is None


@LEVELS
async def test_a_broker_that_dies_ends_its_connections_and_comes_back(
    gateway: Gateway, mosquitto: Mosquitto, level: int
) -> None:
    async with gateway.device() as device:
        await device.connect(level)
        assert mosquitto.pid is not None
        mosquitto.kill()
        if level == V5:
            assert (await device.goodbye()).code == 0x8B
        assert await device.hear() is None
    await until(lambda: mosquitto.pid is None)
    await mosquitto.ready()
    async with gateway.device() as device:
        assert (await device.connect(level)).code == 0


async def test_a_connect_that_does_not_come_is_not_waited_for(
    gateway: Gateway,
) -> None:
    gateway.limits = MqttLimits(connect_s=0.05)
    async with gateway.device() as device:
        device.say(b"\x10\x20\x00")
        assert await device.hear() is None


async def test_an_admission_that_takes_too_long_is_server_unavailable(
    gateway: Gateway,
) -> None:
    gateway.limits = MqttLimits(admit_s=0.05)
    gateway.admitting.clear()
    async with gateway.device() as device:
        assert (await device.connect()).code == 0x88


@pytest.mark.parametrize(
    ("first", "answer"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", None),
        (b"\x00", None),
        (PINGREQ, None),
        (b"\x10\xff\xff\xff\xff\xff", None),
        (b"\x10\x0d\x00\x04MQTT\x04\x03\x00\x3c\x00\x01a", None),
        (b"\x10\x0e\x00\x04MQTT\x05\x03\x00\x3c\x00\x00\x01a", (V5, 0x81)),
        (b"\x10\xff\xff\x03\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x01a", (V5, 0x95)),
        (b"\x10\x0d\x00\x04MQTT\x03\x02\x00\x3c\x00\x01a", (V311, 1)),
        (b"\x10\x0e\x00\x04MQTT\x06\x02\x00\x3c\x00\x00\x01a", (V5, 0x84)),
    ],
)
async def test_nonsense_in_place_of_connect_is_answered_where_it_can_be(
    gateway: Gateway, first: bytes, answer: tuple[int, int] | None
) -> None:
    async with gateway.device() as device:
        device.say(first)
        packet = await device.hear()
        if answer is None:
            assert packet is None
        else:
            assert packet is not None
            level, code = answer
            assert Connack.parse(packet, level).code == code
            assert await device.hear() is None


@pytest.mark.parametrize(
    ("packet", "code"),
    [
        (Connect("").encode(), 0x82),
        (Connack().encode(V5), 0x82),
        (b"\xf0\x00", 0x82),
        (b"\xc0\x01x", 0x82),
        (b"\x36\x00", 0x81),
        (b"\x30\x03\x00\x05a", 0x81),
        (b"\x82\x02\x00\x01", 0x81),
        (b"\x30\xff\xff\xff\x7f", 0x95),
    ],
)
async def test_a_malformed_packet_ends_the_conversation_with_its_reason(
    gateway: Gateway, packet: bytes, code: int
) -> None:
    async with gateway.device() as device:
        await device.connect()
        device.say(PINGREQ, packet)
        heard = await device.hear()
        if heard == PINGRESP:
            heard = await device.hear()
        assert heard is not None
        assert Farewell.parse(heard, V5).code == code
        assert await device.hear() is None
    async with gateway.device() as device:
        assert (await device.connect()).code == 0


@LEVELS
async def test_a_revoked_device_is_cut_and_told_why(
    gateway: Gateway, level: int
) -> None:
    async with gateway.device() as device:
        await device.connect(level)
        gateway.relays[0].cut(DEVICE_REVOKED)
        if level == V5:
            farewell = await device.goodbye()
            assert farewell.code == 0x98
            reason = text_of(farewell.properties, Prop.REASON_STRING)
            assert reason is not None
            assert read_reason_text(reason) is DEVICE_REVOKED
        assert await device.hear() is None
    await gateway.closed.wait()
    assert gateway.relays == []


async def test_a_device_cut_while_it_is_admitted_does_not_come_in(
    gateway: Gateway,
) -> None:
    def too_late(relay: Relay, device: DeviceId) -> None:
        raise PeerError(DEVICE_REVOKED)

    gateway.on_open = too_late
    async with gateway.device() as device:
        assert (await device.connect()).code == 0x87


async def test_a_stuck_reader_costs_its_limit_and_is_still_cut(
    gateway: Gateway,
) -> None:
    async with application(gateway.address) as (app, heard), gateway.device() as device:
        await device.connect(V311)
        await device.subscribe("devices/pump-7/down/#")
        device.writer.transport.pause_reading()  # type: ignore[attr-defined] # it has
        relay = gateway.relays[0]
        packet = build_publish("devices/pump-7/down/x", bytes(50_000), level=V311)
        for _ in range(100):
            await heard.drained.wait()
            app.write(packet)
        await until(lambda: relay._device_full)
        app.write(PINGREQ)
        while await heard.heard.get() != PINGRESP:
            pass
        transport = relay._device
        assert transport is not None
        # Its limit, what one read of the broker's socket may give, and one packet.
        assert transport.get_write_buffer_size() < 65_536 + 262_144 + 2 * 50_000
        relay.cut(DEVICE_REVOKED)
        await gateway.closed.wait()


async def test_refusals_are_not_collected_for_a_device_that_does_not_read(
    gateway: Gateway,
) -> None:
    async with gateway.device() as device:
        await device.connect()
        device.writer.transport.pause_reading()  # type: ignore[attr-defined] # it has
        relay = gateway.relays[0]
        flood = b"".join(
            build_publish("no", b"", level=V5, qos=1, packet_id=n)
            for n in range(1, 20_000)
        )
        device.writer.transport.set_write_buffer_limits(high=1)
        device.say(flood)
        await until(lambda: relay._answers_wait)
        transport = relay._device
        assert transport is not None
        assert not transport.is_reading()
        assert transport.get_write_buffer_size() < 65_536 + 1_000
        # Its twin: who reads again gets every answer.
        device.writer.transport.resume_reading()  # type: ignore[attr-defined] # it has
        for number in range(1, 20_000):
            packet = await device.hear()
            assert packet is not None
            assert packet[0] == Kind.PUBACK << 4
            assert int.from_bytes(packet[2:4]) == number


async def test_a_slow_broker_slows_the_device(tmp_path: Path) -> None:
    path = str(tmp_path / "slow")
    made: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
        asyncio.Queue()
    )
    server = await asyncio.start_unix_server(
        lambda reader, writer: made.put_nowait((reader, writer)), path
    )
    async with (
        server,
        listening(BrokerAddress(path=path)) as gateway,
        gateway.device() as device,
    ):
        device.say(Connect("").encode())
        reader, writer = await made.get()
        writer.write(Connack().encode(V5))
        assert await device.hear() is not None
        relay = gateway.relays[0]
        size = 0
        packet = build_publish("devices/pump-7/up/t", bytes(50_000), level=V5)
        device.writer.transport.set_write_buffer_limits(high=1)
        for _ in range(200):
            device.say(packet)
            size += len(packet)
        await until(lambda: relay._broker_full)
        broker = relay._broker
        assert broker is not None
        assert broker.get_write_buffer_size() < 65_536 + 262_144 + 100_000
        # Its twin: when the broker reads again, everything arrives.
        splitter = Splitter(1 << 20)
        while size:
            splitter.receive_data(await reader.read(65_536))
            while (got := splitter.next_packet()) is not None:
                if got[0] >> 4 == Kind.PUBLISH:
                    assert got == packet
                    size -= len(got)
        writer.close()
        await writer.wait_closed()


async def test_what_a_device_sent_before_it_left_arrives(gateway: Gateway) -> None:
    async with (
        application(gateway.address, "devices/#") as (_, heard),
        gateway.device() as device,
    ):
        await device.connect()
        device.say(
            *(
                build_publish("devices/pump-7/up/t", b"%d" % n, level=V5)
                for n in range(50)
            ),
            Farewell().encode(V5),
        )
        device.writer.write_eof()
        for number in range(50):
            packet = await heard.heard.get()
            at = Publish.parse(packet, V311).payload_at
            assert packet[at:] == b"%d" % number


async def test_a_refusal_is_logged_once_a_connection(gateway: Gateway) -> None:
    async with gateway.device() as device:
        await device.connect()
        for number in range(1, 4):
            device.say(
                build_publish("no", b"", level=V5, qos=1, packet_id=number),
            )
            await device.hear()
        assert [name for name, _ in gateway.events] == ["refused"]
        assert gateway.events[0][1]["device"] == "pump-7"
        assert PACKET_MALFORMED.code not in str(gateway.events)


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_connection_that_ends_while_it_is_admitted_is_closed_once(
    gateway: Gateway, leaves: bool
) -> None:
    arrived = asyncio.Event()
    seen: list[Relay] = []

    async def admit(transport: asyncio.Transport) -> MqttPeer:
        relay = transport.get_protocol()
        assert isinstance(relay, Relay)
        seen.append(relay)
        arrived.set()
        await gateway.admitting.wait()
        return MqttPeer(PUMP)

    gateway.admit_by = admit
    gateway.admitting.clear()
    async with gateway.device() as device:
        device.say(Connect("").encode())
        await arrived.wait()
        seen[0].cut(DEVICE_REVOKED)
        if leaves:
            assert await device.hear() is not None
            assert await device.hear() is None
        gateway.admitting.set()
        if not leaves:
            packet = await device.hear()
            assert packet is not None
            assert Connack.parse(packet, V5).code == 0x87
    await until(lambda: not gateway.relays)
    assert gateway.names == {}


async def test_nonsense_ends_their_connection_and_no_other(
    gateway: Gateway,
) -> None:
    async with gateway.device() as steady:
        await steady.connect(client_id="pump-7:steady")
        for number in range(150):
            async with gateway.device() as device:
                # The same nonsense in every run.
                noise = hashlib.shake_256(b"%d" % number).digest(400)
                if number % 2:
                    await device.connect(V5 if number % 4 == 1 else V311)
                body = noise[2 : 2 + noise[0] % 120]
                kind = (1 + noise[1] % 15) << 4 | (noise[1] & 2)
                device.say(bytes((kind, len(body))) + body, noise)
                device.writer.write_eof()
                while await device.hear() is not None:
                    pass
        steady.say(PINGREQ)
        assert await steady.hear() == PINGRESP
    assert "incident" not in {name for name, _ in gateway.events}
