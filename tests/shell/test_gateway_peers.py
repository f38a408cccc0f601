"""Who is let in on a connection, who is cut, and what happens without the registry."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from gateway.follow import Follower, Followers
from gateway.live import Connection, Live
from gateway.peers import Peers
from provisioning.model.credentials import PskProof, RevocationReason
from provisioning.model.errors import Unavailable
from provisioning.model.ids import DeviceId, PskIdentity
from provisioning.model.refusals import AWAY, DEVICE_REVOKED, TOO_MANY_REQUESTS
from provisioning.registry.store import Registry
from provisioning.registry.upgrade import upgrade
from provisioning.tls.engine import Established

PUMP = DeviceId.parse("pump-7")
FIRST = PskIdentity(PUMP, 1)
GRACE = timedelta(hours=1)


def clock():
    return datetime.now(UTC)


async def follower_has(registry, seq):
    """Poll as `devices revoke` does: the registry has no event for it."""
    while await registry.behind(seq, clock(), timedelta(minutes=1)):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


class Line:
    """As much of a TLS connection as `Peers` looks at."""

    def __init__(self):
        self.established = Established(
            "TLSv1.3", "suite", None, False, PskProof(FIRST), None, 1, 1
        )
        self.cuts = []
        self.cut = asyncio.Event()

    def end(self, refusal):
        self.cuts.append(refusal)
        self.cut.set()

    def is_closing(self):
        return bool(self.cuts)

    def get_extra_info(self, name):
        return ("127.0.0.1", 4711) if name == "peername" else None


@pytest.fixture
def url(tmp_path):
    return f"sqlite+aiosqlite:///{tmp_path / 'registry.sqlite3'}"


@pytest.fixture
async def registry(url):
    await upgrade(url)
    found = await Registry.open(url)
    await found.create_psk(PUMP, clock(), "test")
    yield found
    await found.close()


def peers_of(registry, live, most=4):
    return Peers(registry, live, clock=clock, grace=GRACE, most=most)


async def arrive(peers, line):
    peer = await peers.look(line.established.proof)
    return await peers.arrived(line, peer, line.end)


async def test_a_device_that_is_known_is_let_in_and_can_be_cut(registry):
    live = Live()
    line = Line()
    peer, connection = await arrive(peers_of(registry, live), line)
    assert peer.refusal is None
    assert live.of(PUMP) == (connection,)
    assert connection.credential == FIRST


async def test_a_revocation_while_a_device_arrives_is_not_missed(registry):
    live = Live()

    class Slow:
        """The registry, with a revocation applied before its answer arrives."""

        def __getattr__(self, name):
            return getattr(registry, name)

        async def connected(self, *args, **named):
            standing = await registry.connected(*args, **named)
            seq = await registry.latest_seq()
            await registry.revoke_device(
                PUMP, RevocationReason.KEY_COMPROMISE, clock(), "test"
            )
            for change in await registry.changes_after(seq, 100):
                registry.apply_change(change)
            return standing

    peer, connection = await arrive(peers_of(Slow(), live), Line())
    assert peer.refusal is DEVICE_REVOKED
    assert connection is None
    assert len(live) == 0


async def test_the_newest_connection_of_a_device_ends_its_oldest(registry):
    live = Live()
    peers = peers_of(registry, live, most=2)
    lines = [Line() for _ in range(3)]
    for line in lines:
        await arrive(peers, line)
    assert [line.cuts for line in lines] == [[TOO_MANY_REQUESTS], [], []]
    assert len(live) == 2


async def test_nobody_new_is_let_in_while_the_registry_is_away(registry):
    live = Live()
    peers = peers_of(registry, live)
    peers.in_step = lambda: False
    with pytest.raises(Unavailable):
        await arrive(peers, Line())
    assert len(live) == 0
    peers.in_step = lambda: True
    await arrive(peers, Line())
    assert len(live) == 1


class Away:
    """A registry that joins a gateway and then is gone, or hangs."""

    def __init__(self, *, hangs):
        self.hangs = hangs

    async def latest_seq(self):
        return 0

    async def join_gateway(self, *_):
        return 1

    async def changes_after(self, *_):
        if self.hangs:
            await asyncio.Event().wait()
        raise Unavailable("the registry")


class Forgetful:
    """A key cache that has nothing."""

    def forget(self, device):
        return None


@pytest.mark.parametrize("hangs", [False, True])
async def test_live_connections_end_when_the_registry_is_away_for_too_long(hangs):
    live = Live()
    cut = asyncio.Event()
    reasons = []

    def end(refusal):
        reasons.append(refusal)
        cut.set()

    live.add(Connection(PUMP, FIRST, end))
    told = []
    follower = Follower(
        "here",
        Away(hangs=hangs),
        live,
        Forgetful(),
        Followers(on_rotate=told.append, on_changed=told.append),
        grace=timedelta(seconds=0.5),
        clock=clock,
        tell=lambda name, _: told.append(name),
    )
    await follower.join()
    task = asyncio.create_task(follower.run())
    async with asyncio.timeout(5):
        await cut.wait()
    task.cancel()
    await asyncio.wait([task])
    assert reasons == [AWAY]
    assert len(live) == 0


async def test_a_change_by_another_process_cuts_the_connection_it_is_about(
    registry, url
):
    live = Live()
    peers = peers_of(registry, live)
    line = Line()
    await arrive(peers, line)
    told = []
    follower = Follower(
        "here",
        registry,
        live,
        Forgetful(),
        Followers(on_rotate=told.append, on_changed=told.append),
        grace=timedelta(minutes=1),
        clock=clock,
        tell=lambda name, _: told.append(name),
    )
    await follower.join()
    other = await Registry.open(url)
    try:
        done = await other.revoke_device(
            PUMP, RevocationReason.KEY_COMPROMISE, clock(), "other"
        )
        task = asyncio.create_task(follower.run())
        async with asyncio.timeout(2):
            await line.cut.wait()
            await follower_has(other, done.seq)
        task.cancel()
        await asyncio.wait([task])
    finally:
        await other.close()
    assert line.cuts == [DEVICE_REVOKED]
    assert "cut" in told
