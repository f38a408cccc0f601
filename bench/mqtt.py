"""mqtt.connect, mqtt.publish, idle.mqtt: the gateway beside mosquitto with TLS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import peers
from bench.client import Identity, Part, Plain, Secure, Work, drive
from bench.house import IN_FLIGHT
from bench.machine import BenchError, pause
from bench.results import spread
from bench.rounds import Plan, Side, compare

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from pathlib import Path

    from bench.house import House
    from bench.machine import Process
    from bench.results import Result
    from provisioning.tls.context import ClientContext

    Works = Callable[[House, int, Sequence[Identity], int], Callable[[], int]]

PAYLOAD = b"x" * 64
KEEP_ALIVE_S = 1_200
_CONNACK, _PUBACK, _DISCONNECT = b"\x20\x02\x00\x00", b"\x40\x02", b"\xe0\x00"


def connect_packet(client: str) -> bytes:
    """CONNECT of MQTT 3.1.1 with a clean session (3.1)."""
    head = b"\x00\x04MQTT\x04\x02" + KEEP_ALIVE_S.to_bytes(2)
    return _packet(0x10, head + _text(client))


def publish_packet(device: str, number: int) -> bytes:
    """PUBLISH with QoS 1 (3.3)."""
    topic = _text(f"devices/{device}/up/bench")
    return _packet(0x32, topic + number.to_bytes(2) + PAYLOAD)


def _packet(kind: int, body: bytes) -> bytes:
    if len(body) < 128:  # noqa: PLR2004 - one octet of length
        return bytes((kind, len(body))) + body
    return bytes((kind, 0x80 | len(body) & 0x7F, len(body) >> 7)) + body


def _text(text: str) -> bytes:
    return len(text).to_bytes(2) + text.encode()


def _taken(connection: Secure, size: int) -> Part:
    data = b""
    while len(data) < size:
        piece = yield from connection.read()
        if not piece:
            raise BenchError("the server ended an MQTT connection")
        data += piece
    return data


def _join(connection: Secure, device: Identity) -> Generator[Plain, None, None]:
    """Handshake, CONNECT, CONNACK."""
    yield from connection.open()
    connection.send(connect_packet(device.device))
    answer = yield from _taken(connection, len(_CONNACK))
    if answer != _CONNACK:
        raise BenchError(f"CONNACK says {answer.hex()}")


def connect(house: House, folder: Path, plan: Plan, name: str) -> Result:
    """Handshakes with mTLS 1.3, from TCP to CONNACK, beside mosquitto."""
    return _beside_mosquitto(house, folder, plan, name, connections)


def publish(house: House, folder: Path, plan: Plan, name: str) -> Result:
    """Messages of 64 octets with QoS 1, one in flight on each connection."""
    return _beside_mosquitto(house, folder, plan, name, messages)


def _beside_mosquitto(
    house: House, folder: Path, plan: Plan, name: str, works: Works
) -> Result:
    # Two for each slot: one may still be leaving while the other comes.
    devices = house.devices(2 * IN_FLIGHT, "ldevid")
    with peers.mosquitto(house, folder) as (process, port):
        return compare(
            name,
            plan,
            Side(
                "gateway",
                house.process,
                lambda n: works(house, house.ports["mqtts"], devices, n),
            ),
            Side(peers.MOSQUITTO, process, lambda n: works(house, port, devices, n)),
        )


def connections(
    house: House, port: int, devices: Sequence[Identity], count: int
) -> Callable[[], int]:
    """That many, each ended as soon as it stands."""
    left: Iterator[int] = iter(range(count))

    def worker(slot: int) -> Work:
        mine = devices[slot::IN_FLIGHT]
        for n in left:
            device = mine[n % len(mine)]
            connection = Secure(port, house.tls13, device, slot=slot)
            yield from _join(connection, device)
            connection.send(_DISCONNECT)
            connection.close()

    def go() -> int:
        drive(worker(slot) for slot in range(IN_FLIGHT))
        return count

    return go


def messages(
    house: House, port: int, devices: Sequence[Identity], count: int
) -> Callable[[], int]:
    """That many over connections that stand already."""
    each = max(1, count // IN_FLIGHT)
    pairs = _standing(port, house.tls13, devices[:IN_FLIGHT])

    def worker(connection: Secure, device: Identity) -> Work:
        for n in range(each):
            connection.send(publish_packet(device.device, n % 65_535 + 1))
            answer = yield from _taken(connection, 4)
            if not answer.startswith(_PUBACK):
                raise BenchError(f"PUBLISH was answered by {answer.hex()}")

    def go() -> int:
        drive(worker(connection, device) for connection, device in pairs)
        for connection, _ in pairs:
            connection.send(_DISCONNECT)
            connection.close()
        return each * IN_FLIGHT

    return go


def _standing(
    port: int, tls: ClientContext, devices: Sequence[Identity]
) -> list[tuple[Secure, Identity]]:
    """A connection for each device, a few handshakes at a time."""
    made: list[tuple[Secure, Identity]] = []
    left = list(devices)

    def worker(slot: int) -> Work:
        while left:
            device = left.pop()
            connection = Secure(port, tls, device, slot=slot)
            yield from _join(connection, device)
            connection.polled = False  # the next `drive` has another epoll
            made.append((connection, device))

    drive(worker(slot) for slot in range(min(IN_FLIGHT, len(left))))
    return made


def idle(house: House, folder: Path, plan: Plan, name: str) -> Result:
    """Growth of resident memory for each connection that stands and is silent.

    In a new process: memory that earlier work left free would take them in unseen.
    """
    warm = plan.idle // 10
    devices = house.devices(plan.idle + warm, "ldevid")
    house.restart()
    with peers.mosquitto(house, folder) as (process, port):
        ours = _growth(house, house.process, house.ports["mqtts"], devices, plan)
        theirs = _growth(house, process, port, devices, plan)
    return spread(name, ours, "KiB", (peers.MOSQUITTO, theirs))


def _growth(
    house: House,
    process: Process,
    port: int,
    devices: Sequence[Identity],
    plan: Plan,
) -> list[float]:
    warm = len(devices) - plan.idle
    open_ = _standing(port, house.tls13, devices[:warm])
    size = plan.idle // plan.rounds
    found = []
    for at in range(plan.rounds):
        pause(0.5)
        before = process.rss_kib()
        batch = devices[warm + at * size : warm + (at + 1) * size]
        open_ += _standing(port, house.tls13, batch)
        pause(0.5)
        found.append((process.rss_kib() - before) / size)
    for connection, _ in open_:
        connection.close()
    return found
