"""Every write fails twice: it did not happen; it happened and the answer was lost.

One table names each write of the registry. After either failure the caller does what
it would do in the field, which is to ask again, and all is as if nothing had failed.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from registry_kit import (
    DAY,
    NOW,
    OPERATOR,
    PUMP,
    Request,
    admit,
    connect,
    facts_of,
    issue,
    new_database,
    new_token,
    psk_standing,
)

from provisioning.model.credentials import AuthMethod, RevocationReason
from provisioning.model.errors import OutcomeUnknown, Unavailable
from provisioning.registry.engine import reader_engine, writer_engine
from provisioning.registry.store import Registry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy.engine import Dialect


class Commits:
    """The dialect's commit, which fails once when it is told to."""

    def __init__(self, dialect: Dialect) -> None:
        self._commit = dialect.do_commit
        self.fail: str | None = None
        dialect.do_commit = self  # type: ignore[method-assign]

    def __call__(self, connection: Any) -> None:
        fail, self.fail = self.fail, None
        if fail == "before":
            message = "disk I/O error"
            raise sqlite3.OperationalError(message)
        self._commit(connection)
        if fail == "after":
            message = "server closed the connection unexpectedly"
            raise sqlite3.InterfaceError(message)


@pytest.fixture
async def broken(tmp_path):
    """A registry, and what makes its next commit fail."""
    url = await new_database(tmp_path)
    writing = writer_engine(url)
    commits = Commits(writing.sync_engine.dialect)
    registry = Registry(writing, reader_engine(url), cache_size=100)
    yield registry, commits
    await registry.close()


@dataclass(frozen=True)
class Write:
    """One write. before: what makes it possible; its result is given to `act`.

    act: the write, which the caller repeats. shown: what tells whether it happened.
    """

    before: Callable[[Registry], Awaitable[Any]]
    act: Callable[[Registry, Any], Awaitable[Any]]
    shown: Callable[[Registry, Any], Awaitable[object]]


async def nothing(registry):
    return None


async def proven(registry):
    credential = await issue(registry, Request())
    await connect(registry, credential)
    return credential


async def successor(registry):
    old = await issue(registry, Request(key="old"))
    await connect(registry, old, times=3)
    new = await issue(registry, Request(key="new"))
    await connect(registry, new)
    return old, new


async def states(registry, _=None):
    view = await registry.device(PUMP)
    if view is None:
        return None
    return (
        view.state,
        view.rotate_by,
        [(one.state, one.first_seen) for one in view.credentials],
    )


async def tokens(registry, _=None):
    return [(one.used, one.revoked_at) for one in await registry.list_tokens()]


async def intents(registry, _=None):
    return len(await registry.unresolved_intents())


async def suspended(registry):
    await proven(registry)
    await registry.suspend(PUMP, NOW, OPERATOR)


async def revoked(registry):
    await proven(registry)
    await registry.revoke_device(PUMP, RevocationReason.UNSPECIFIED, NOW, OPERATOR)


WRITES = {
    "finish": Write(
        lambda registry: admit(registry, Request()),
        lambda registry, intent: registry.finish(intent, b"certificate", NOW),
        states,
    ),
    "void": Write(
        lambda registry: admit(registry, Request()),
        lambda registry, intent: registry.void(intent.id, "HSM away", NOW),
        intents,
    ),
    "first connection": Write(
        lambda registry: issue(registry, Request()), connect, states
    ),
    "second connection": Write(
        successor, lambda registry, pair: connect(registry, pair[1]), states
    ),
    "rotated": Write(
        successor,
        lambda registry, pair: registry.rotated(PUMP, pair[1].serial, NOW),
        states,
    ),
    "sweep": Write(proven, lambda registry, _: registry.sweep(NOW + 31 * DAY), states),
    "create_psk": Write(
        nothing, lambda registry, _: registry.create_psk(PUMP, NOW, OPERATOR), states
    ),
    "next_psk": Write(
        proven,
        lambda registry, _: registry.next_psk(PUMP, NOW, AuthMethod.CERTIFICATE),
        states,
    ),
    "create_token": Write(nothing, lambda registry, _: new_token(registry), tokens),
    "revoke_token": Write(
        new_token,
        lambda registry, _: registry.revoke_token("t1", NOW, OPERATOR),
        tokens,
    ),
    "revoke_device": Write(
        proven,
        lambda registry, _: registry.revoke_device(
            PUMP, RevocationReason.KEY_COMPROMISE, NOW, OPERATOR
        ),
        states,
    ),
    "revoke_credential": Write(
        proven,
        lambda registry, credential: registry.revoke_credential(
            PUMP, credential.serial, RevocationReason.KEY_COMPROMISE, NOW, OPERATOR
        ),
        states,
    ),
    "suspend": Write(
        proven, lambda registry, _: registry.suspend(PUMP, NOW, OPERATOR), states
    ),
    "resume": Write(
        suspended, lambda registry, _: registry.resume(PUMP, NOW, OPERATOR), states
    ),
    "readmit": Write(
        revoked, lambda registry, _: registry.readmit(PUMP, NOW, OPERATOR), states
    ),
    "ask_rotate": Write(
        proven,
        lambda registry, _: registry.ask_rotate(PUMP, NOW + DAY, NOW, OPERATOR),
        states,
    ),
    "add_audit": Write(
        nothing,
        lambda registry, _: registry.add_audit("initialised", {}, NOW, OPERATOR),
        # A repeat is a second event: both are true.
        lambda registry, _: events_seen(registry),
    ),
    "join_gateway": Write(
        nothing,
        lambda registry, _: registry.join_gateway("alpha", 1, NOW),
        lambda registry, _: registry.behind(1, NOW, DAY),
    ),
    "beat": Write(
        lambda registry: registry.join_gateway("alpha", 1, NOW),
        lambda registry, gateway: registry.beat(gateway, 7, NOW),
        lambda registry, _: registry.behind(7, NOW, DAY),
    ),
    "leave": Write(
        lambda registry: registry.join_gateway("alpha", 1, NOW),
        lambda registry, gateway: registry.leave(gateway),
        lambda registry, _: registry.behind(1, NOW, DAY),
    ),
}


async def events_seen(registry):
    return bool(await registry.audit_after())


@pytest.mark.parametrize("name", WRITES)
async def test_a_write_that_did_not_happen_left_nothing_and_can_be_repeated(
    broken, name
):
    registry, commits = broken
    write = WRITES[name]
    given = await write.before(registry)
    was = await write.shown(registry, given)
    commits.fail = "before"
    with pytest.raises(Unavailable):
        await write.act(registry, given)
    assert await write.shown(registry, given) == was
    await write.act(registry, given)
    assert await write.shown(registry, given) != was


@pytest.mark.parametrize("name", WRITES)
async def test_a_write_whose_answer_was_lost_can_be_repeated_and_happens_once(
    broken, name
):
    registry, commits = broken
    write = WRITES[name]
    given = await write.before(registry)
    was = await write.shown(registry, given)
    commits.fail = "after"
    with pytest.raises(OutcomeUnknown):
        await write.act(registry, given)
    happened = await write.shown(registry, given)
    assert happened != was
    await write.act(registry, given)
    assert await write.shown(registry, given) == happened


async def test_an_intent_that_was_not_recorded_cost_the_token_nothing(broken):
    registry, commits = broken
    token = await new_token(registry)
    commits.fail = "before"
    with pytest.raises(Unavailable):
        await admit(registry, Request(token=token))
    assert await tokens(registry) == [(0, None)]
    assert await intents(registry) == 0
    assert await registry.device(PUMP) is None
    await issue(registry, Request(token=token))
    assert await tokens(registry) == [(1, None)]


async def test_an_intent_whose_answer_was_lost_is_voided_before_the_next_is_admitted(
    broken,
):
    registry, commits = broken
    token = await new_token(registry)
    commits.fail = "after"
    with pytest.raises(OutcomeUnknown):
        await admit(registry, Request(token=token))
    assert await intents(registry) == 1
    assert await tokens(registry) == [(1, None)]

    # The device asks again: nothing stands in its way, and its token is good.
    facts = await facts_of(registry, Request(token=token))
    assert facts.earlier is None
    assert facts.token.used == 0
    again = Request(token=token, now=NOW + DAY / 2)
    await issue(registry, again)
    assert await tokens(registry) == [(1, None)]
    assert await intents(registry) == 0


async def test_a_lost_intent_that_never_was_does_not_take_another_with_it(broken):
    registry, commits = broken
    commits.fail = "after"
    with pytest.raises(OutcomeUnknown):
        await admit(registry, Request())
    # Had the commit been lost, its number would now be somebody else's.
    intent = await admit(registry, Request(key="other", now=NOW + DAY))
    assert [one.id for one in await registry.unresolved_intents()] == [intent.id]


async def test_a_crl_number_is_never_given_twice_whatever_was_lost(broken):
    registry, commits = broken
    given = [await registry.next_crl_number("issuing")]
    for fail, kind in (("before", Unavailable), ("after", OutcomeUnknown)):
        commits.fail = fail
        with pytest.raises(kind):
            await registry.next_crl_number("issuing")
        given.append(await registry.next_crl_number("issuing"))
    assert given == sorted(set(given))


async def test_when_a_device_was_last_seen_goes_with_the_next_second_if_it_is_lost(
    broken,
):
    registry, commits = broken
    credential = await issue(registry, Request())
    await connect(registry, credential, times=2)
    await registry.create_psk(PUMP, NOW, OPERATOR)
    assert await psk_standing(registry, 1) is not None
    commits.fail = "before"
    await registry.write_seen()
    assert (await registry.device(PUMP)).last_seen is None
    await registry.write_seen()
    assert (await registry.device(PUMP)).last_seen.at == NOW
