"""Group commit: one transaction for many, and each caller its own answer."""

from __future__ import annotations

import asyncio
import sqlite3

import pytest
from registry_kit import (
    DAY,
    NOW,
    OPERATOR,
    PUMP,
    Request,
    admit,
    certificate,
    connect,
    facts_of,
    issue,
    new_database,
    new_token,
    opened,
    state_of,
)
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError

from provisioning.model.errors import PeerError, Unavailable
from provisioning.model.ids import DeviceId
from provisioning.model.refusals import TOKEN_REFUSED
from provisioning.registry.engine import reader_engine, writer_engine
from provisioning.registry.proofs import NextPsk
from provisioning.registry.store import Registry
from provisioning.registry.writer import Writer

FLEET = [DeviceId.parse(f"pump-{n}") for n in range(100)]


@pytest.fixture
async def url(tmp_path):
    return await new_database(tmp_path)


@pytest.fixture
async def counted(url):
    """A registry, and the list that each of its commits makes longer."""
    commits: list[object] = []
    writing = writer_engine(url)
    commit = writing.dialect.do_commit

    def counting(connection):
        commits.append(connection)
        commit(connection)

    writing.dialect.do_commit = counting
    registry = Registry(writing, reader_engine(url), cache_size=1000)
    yield registry, commits
    await registry.close()


async def test_a_hundred_enrolments_at_once_share_a_few_transactions(counted):
    registry, commits = counted
    token = await new_token(registry, uses=1000)
    commits.clear()
    credentials = await asyncio.gather(
        *(issue(registry, Request(device, key=device, token=token)) for device in FLEET)
    )
    assert len({credential.id for credential in credentials}) == 100
    # One for all the intents and one for all the outcomes; a caller or two may come
    # late to either.
    assert len(commits) <= 4
    (row,) = await registry.list_tokens()
    assert row.used == 100
    standings = await asyncio.gather(*(connect(registry, one) for one in credentials))
    assert {standing.credential.state for standing in standings} == {"active"}


async def test_missed_standings_are_asked_for_together(url):
    async with opened(url) as registry:
        credentials = [
            await issue(registry, Request(device, key=device)) for device in FLEET[:20]
        ]
        await registry.create_psk(PUMP, NOW, OPERATOR)
    reading = reader_engine(url)
    statements: list[str] = []
    event.listen(
        reading.sync_engine,
        "before_cursor_execute",
        lambda *arguments: statements.append(arguments[2]),
    )
    registry = Registry(writer_engine(url), reading, cache_size=1000)
    try:
        for _ in range(2):
            found = await asyncio.gather(
                *(registry.standing_of_certificate(one.serial) for one in credentials)
            )
            assert [one.credential.id for one in found] == [
                one.id for one in credentials
            ]
    finally:
        await registry.close()
    assert len(statements) == 1


async def test_a_refusal_is_its_callers_alone(counted):
    registry, _ = counted

    def refuse(facts):
        raise PeerError(TOKEN_REFUSED)

    results = await asyncio.gather(
        issue(registry, Request(FLEET[0], key=0)),
        registry.admit(Request(FLEET[1], key=1).ask(), refuse),
        issue(registry, Request(FLEET[2], key=2)),
        return_exceptions=True,
    )
    assert isinstance(results[1], PeerError)
    listed = await registry.list_devices()
    assert {view.id for view in listed.devices} == {FLEET[0], FLEET[2]}


async def test_a_bug_in_one_decision_is_its_callers_alone(counted):
    registry, _ = counted

    def broken(facts):
        raise ZeroDivisionError

    results = await asyncio.gather(
        issue(registry, Request(FLEET[0], key=0)),
        registry.admit(Request(FLEET[1], key=1).ask(), broken),
        issue(registry, Request(FLEET[2], key=2)),
        return_exceptions=True,
    )
    assert isinstance(results[1], ZeroDivisionError)
    assert await state_of(registry, results[0]) == "pending"
    assert await state_of(registry, results[2]) == "pending"


async def test_a_serial_that_exists_already_hits_only_the_one_that_brings_it(counted):
    registry, _ = counted
    first = await issue(registry, Request())
    twice = Request(FLEET[1], key=1)
    intent = twice.intent(await facts_of(registry, twice))
    intent.serial = first.serial
    await registry.admit(twice.ask(), lambda _facts: intent)
    good = await admit(registry, Request(FLEET[2], key=2))
    results = await asyncio.gather(
        registry.finish(intent, b"the same serial", NOW),
        registry.finish(good, b"another", NOW),
        return_exceptions=True,
    )
    assert isinstance(results[0], IntegrityError)
    assert await state_of(registry, results[1]) == "pending"
    assert [one.id for one in await registry.unresolved_intents()] == [intent.id]


async def test_a_caller_that_goes_away_does_not_break_its_group(counted):
    registry, _ = counted
    tasks = [
        asyncio.create_task(issue(registry, Request(device, key=device)))
        for device in FLEET[:10]
    ]
    await asyncio.sleep(0)  # all of them wait for the same transaction now
    tasks[3].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[3], asyncio.CancelledError)
    assert [isinstance(one, BaseException) for one in results].count(True) == 1
    # Its intent was recorded all the same, and waits to be recovered.
    assert [one.device for one in await registry.unresolved_intents()] == [FLEET[3]]


async def test_operations_of_one_group_see_what_those_before_them_did(counted):
    registry, commits = counted
    commits.clear()
    generations = await asyncio.gather(
        *(registry.create_psk(PUMP, NOW, OPERATOR) for _ in range(5)),
        registry.next_crl_number("issuing"),
        registry.next_crl_number("issuing"),
        registry.ask_rotate(PUMP, NOW + DAY, NOW, OPERATOR),
    )
    assert generations == [1, 1, 1, 1, 1, 1, 2, 1]
    assert len(commits) == 1


async def test_while_another_process_holds_the_lock_the_registry_is_away(url):
    async with opened(url) as registry:
        with sqlite3.connect(url.partition("///")[2].partition("?")[0]) as other:
            other.execute("BEGIN IMMEDIATE")
            results = await asyncio.gather(
                issue(registry, Request(FLEET[0], key=0)),
                registry.create_psk(PUMP, NOW, OPERATOR),
                return_exceptions=True,
            )
            assert {type(one) for one in results} == {Unavailable}
            # Reading goes on meanwhile.
            assert await registry.device(PUMP) is None
            other.rollback()
        other.close()
        assert await registry.create_psk(PUMP, NOW, OPERATOR) == 1
        assert (await registry.device(FLEET[0])) is None


async def test_a_full_disk_is_away_and_what_was_written_before_stays(url):
    writing = writer_engine(url)
    pages: list[int] = []

    @event.listens_for(writing.sync_engine, "connect")
    def limit(connection, _record):
        if pages:
            cursor = connection.cursor()
            cursor.execute(f"PRAGMA max_page_count = {pages[0]}")
            cursor.close()

    pages.append(1)  # SQLite makes it what the file has already
    registry = Registry(writing, reader_engine(url), cache_size=10)
    try:
        big = 100_000 * b"x"
        intent = await admit(registry, Request())
        with pytest.raises(Unavailable):
            await registry.finish(intent, big, NOW)
        assert [one.id for one in await registry.unresolved_intents()] == [intent.id]
        pages.clear()
        assert (await registry.finish(intent, big, NOW)).id == intent.id
    finally:
        await registry.close()


async def test_a_database_that_does_not_answer_in_time_is_away(tmp_path):
    url = (await new_database(tmp_path)).replace("timeout=0.3", "timeout=1.5")
    engine = writer_engine(url)
    writer = Writer(engine, lambda _page: None, deadline_s=0.1)
    make = NextPsk(PUMP, "operator", OPERATOR, NOW)
    with sqlite3.connect(tmp_path / "registry.sqlite3") as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable):
            await writer.run(make)
        other.rollback()
    other.close()
    assert await writer.run(make) == 1
    await writer.close()
    await engine.dispose()


async def test_a_closed_registry_is_away(url):
    async with opened(url) as registry:
        pass
    with pytest.raises(Unavailable):
        await registry.create_psk(PUMP, NOW, OPERATOR)


async def test_closing_finishes_what_is_waiting(url):
    async with opened(url) as registry:
        waiting = asyncio.create_task(issue(registry, Request()))
        intended = asyncio.create_task(registry.create_psk(FLEET[1], NOW, OPERATOR))
        await asyncio.sleep(0)
    assert await intended == 1
    with pytest.raises(Unavailable):
        await waiting  # its intent is recorded; finishing came too late
    async with opened(url) as registry:
        assert len(await registry.unresolved_intents()) == 1


async def test_a_certificate_is_found_again_after_the_process_ended(url):
    request = Request()
    async with opened(url) as registry:
        credential = await issue(registry, request)
    async with opened(url) as registry:
        facts = await facts_of(registry, request)
        assert facts.earlier.certificate_der == certificate(request)
        assert facts.earlier.credential == credential
