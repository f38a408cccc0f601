"""What the writer keeps in memory never changes what it does.

The same operations, once in groups on one registry, and once each by itself on a
registry that was opened for it alone and so remembers nothing: every answer and every
row must be the same.
"""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from registry_kit import (
    DAY,
    HOUR,
    NOW,
    OPERATOR,
    Request,
    digest,
    new_database,
    new_token,
    opened,
)

from provisioning.model.credentials import AuthMethod, RevocationReason
from provisioning.model.errors import OutcomeUnknown, PeerError
from provisioning.model.ids import DeviceId
from provisioning.model.refusals import IN_PROGRESS, TOKEN_REFUSED
from provisioning.registry.records import NewIntent, Repeat

DEVICES = [DeviceId("pump-7"), DeviceId("PUMP-7"), DeviceId("valve-2")]
KINDS = [
    "admit",
    "admit",
    "admit",
    "finish",
    "finish",
    "void",
    "connect",
    "connect",
    "rotated",
    "psk",
    "next psk",
    "revoke",
    "revoke one",
    "readmit",
    "suspend",
    "resume",
    "ask rotate",
    "token",
]
STEP = st.tuples(st.sampled_from(KINDS), st.integers(0, 5))
GROUPS = st.lists(st.lists(STEP, min_size=1, max_size=6), max_size=5)


class Player:
    """Plays steps on a registry, and remembers what they led to."""

    def __init__(self) -> None:
        self.intents: list[NewIntent] = []
        self.credentials: list[int] = []
        self.results: list[object] = []

    async def play(self, registry, step, number: int) -> None:
        try:
            result = await self.step(registry, *step, NOW + number * HOUR / 4)
        except (PeerError, OutcomeUnknown) as error:
            result = type(error), str(error)
        self.results.append((number, result))

    def step(self, registry, kind: str, which: int, now):  # noqa: C901, PLR0911, PLR0912 - one row a kind
        device = DEVICES[which % 3]
        reason = RevocationReason.UNSPECIFIED
        match kind:
            case "admit":
                return self.admit(registry, device, which, now)
            case "finish" | "void" if self.intents:
                intent = self.intents[-1 - which % min(2, len(self.intents))]
                if kind == "void":
                    return registry.void(intent.id, "test", now)
                return self.finish(registry, intent, now)
            case "connect" | "rotated" | "revoke one" if self.credentials:
                credential = self.credentials[-1 - which % len(self.credentials)]
                if kind == "connect":
                    return registry.connected(
                        credential.id,
                        auth=AuthMethod.PSK,
                        resumed=False,
                        address="",
                        now=now,
                        grace=HOUR,
                    )
                if kind == "rotated":
                    return registry.rotated(credential.device, credential.serial, now)
                return registry.revoke_credential(
                    credential.device, credential.serial, reason, now, OPERATOR
                )
            case "psk":
                return registry.create_psk(device, now, OPERATOR)
            case "next psk":
                return registry.next_psk(device, now, AuthMethod.PSK)
            case "revoke":
                return registry.revoke_device(device, reason, now, OPERATOR)
            case "readmit":
                return registry.readmit(device, now, OPERATOR)
            case "suspend":
                return registry.suspend(device, now, OPERATOR)
            case "resume":
                return registry.resume(device, now, OPERATOR)
            case "ask rotate":
                return registry.ask_rotate(device, now + DAY, now, OPERATOR)
            case "token":
                return registry.revoke_token(f"t{which}", now, OPERATOR)
            case _:
                return asyncio.sleep(0)

    async def admit(self, registry, device, which: int, now):
        request = Request(device, key=which // 2, token=digest("token"), now=now)

        def decide(facts):
            self.results.append(facts)
            earlier = facts.earlier
            if earlier is not None and not earlier.resolved:
                raise PeerError(IN_PROGRESS)
            if earlier is not None:
                return Repeat(earlier.credential, earlier.certificate_der)
            if facts.token.used >= facts.token.uses or facts.token.revoked_at:
                raise PeerError(TOKEN_REFUSED)
            return request.intent(facts)

        decision = await registry.admit(request.ask(), decide)
        if isinstance(decision, NewIntent):
            self.intents.append(decision)
        return decision

    async def finish(self, registry, intent, now):
        credential = await registry.finish(intent, digest(intent.serial), now)
        if credential not in self.credentials:
            self.credentials.append(credential)
        return credential


def rows(folder: Path) -> dict[str, list[tuple]]:
    database = sqlite3.connect(folder / "registry.sqlite3")
    queries = {
        # When a device was last seen is gathered over time: not compared.
        "devices": "SELECT id, device_id, state, rotate_by FROM devices ORDER BY 1",
        "credentials": "SELECT * FROM credentials ORDER BY 1",
        "intents": "SELECT * FROM intents ORDER BY 1",
        "tokens": "SELECT * FROM tokens ORDER BY 1",
        "changes": "SELECT * FROM changes ORDER BY 1",
        "audit": "SELECT * FROM audit ORDER BY 1",
    }
    found = {name: database.execute(sql).fetchall() for name, sql in queries.items()}
    database.close()
    return found


async def in_groups(folder: Path, groups) -> Player:
    url = await new_database(folder)
    player, number = Player(), 0
    async with opened(url) as registry:
        await new_token(registry, uses=4)
        for group in groups:
            tasks = []
            for step in group:
                number += 1
                tasks.append(player.play(registry, step, number))
            await asyncio.gather(*tasks)
    return player


async def one_by_one(folder: Path, groups) -> Player:
    url = await new_database(folder)
    player, number = Player(), 0
    async with opened(url) as registry:
        await new_token(registry, uses=4)
    for group in groups:
        # What steps refer to is what was there when their group began.
        plays = []
        for step in group:
            number += 1
            frozen = Player()
            frozen.intents = list(player.intents)
            frozen.credentials = list(player.credentials)
            frozen.results = player.results
            plays.append((frozen, step, number))
        for frozen, step, at in plays:
            known = len(frozen.intents), len(frozen.credentials)
            async with opened(url) as registry:
                await frozen.play(registry, step, at)
            player.intents += frozen.intents[known[0] :]
            player.credentials += [
                one
                for one in frozen.credentials[known[1] :]
                if one not in player.credentials
            ]
    return player


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    # Shrinking takes minutes where an example takes a second.
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
@given(GROUPS)
def test_a_group_with_a_memory_does_what_each_would_do_alone(groups):
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        together = asyncio.run(in_groups(Path(one), groups))
        alone = asyncio.run(one_by_one(Path(other), groups))
        assert sorted(map(repr, together.results)) == sorted(map(repr, alone.results))
        assert rows(Path(one)) == rows(Path(other))
