"""The schema: made by `upgrade` alone, refused when it is another program's."""

from __future__ import annotations

import sqlite3
import stat
from importlib.resources import files

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from registry_kit import NOW, OPERATOR, PUMP, Request, issue, new_database, opened
from sqlalchemy import create_engine

from provisioning.model.errors import Unusable
from provisioning.registry.engine import writer_engine
from provisioning.registry.schema import SCHEMA_VERSION, metadata
from provisioning.registry.store import Registry
from provisioning.registry.upgrade import newest_version, upgrade


@pytest.fixture
def path(tmp_path):
    return tmp_path / "registry.sqlite3"


def url_of(path) -> str:
    return f"sqlite+aiosqlite:///{path}"


async def test_a_registry_that_was_never_made_is_refused_with_what_to_do(path):
    with pytest.raises(Unusable, match="birthmark db upgrade"):
        await Registry.open(url_of(path))
    assert not path.exists()


async def test_an_empty_file_is_refused_with_what_to_do(path):
    path.touch()
    with pytest.raises(Unusable, match="birthmark db upgrade"):
        await Registry.open(url_of(path))


async def test_an_older_schema_is_refused_with_what_to_do(tmp_path, path):
    await new_database(tmp_path)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE alembic_version SET version_num = '0000'")
    database.close()
    with pytest.raises(Unusable, match="birthmark db upgrade"):
        await Registry.open(url_of(path))


async def test_a_newer_schema_is_refused_by_both(tmp_path, path):
    await new_database(tmp_path)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE alembic_version SET version_num = '9000'")
    database.close()
    with pytest.raises(Unusable, match="newer"):
        await Registry.open(url_of(path))
    with pytest.raises(Unusable):
        await upgrade(url_of(path))


async def test_what_is_no_database_is_the_operators_to_restore(path):
    path.write_bytes(b"not a database, " * 1000)
    with pytest.raises(Unusable, match="backup"):
        await Registry.open(url_of(path))
    with pytest.raises(Unusable, match="backup"):
        await upgrade(url_of(path))


async def test_a_folder_that_is_not_there_is_the_operators_to_make(tmp_path):
    with pytest.raises(Unusable):
        await upgrade(url_of(tmp_path / "nowhere" / "registry.sqlite3"))


async def test_a_registry_in_memory_is_refused():
    with pytest.raises(Unusable, match="forget"):
        await Registry.open("sqlite+aiosqlite://")


async def test_upgrading_again_changes_nothing(tmp_path):
    url = await new_database(tmp_path)
    async with opened(url) as registry:
        await issue(registry, Request())
    await upgrade(url)
    async with opened(url) as registry:
        assert (await registry.device(PUMP)) is not None


async def test_nobody_but_the_owner_may_read_any_of_its_files(tmp_path):
    url = await new_database(tmp_path)
    async with opened(url) as registry:
        await registry.create_psk(PUMP, NOW, OPERATOR)
        modes = {
            file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()
        }
    assert modes == {
        "registry.sqlite3": 0o600,
        "registry.sqlite3-wal": 0o600,
        "registry.sqlite3-shm": 0o600,
    }


async def test_every_commit_is_flushed_and_no_device_can_be_orphaned(tmp_path):
    url = await new_database(tmp_path)
    engine = writer_engine(url)
    pragmas = {}
    async with engine.connect() as connection:
        for name in ("journal_mode", "synchronous", "foreign_keys"):
            found = await connection.exec_driver_sql(f"PRAGMA {name}")
            pragmas[name] = found.scalar_one()
    await engine.dispose()
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


async def test_the_migrations_make_what_the_program_expects(tmp_path, path):
    await new_database(tmp_path)
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        differences = compare_metadata(context, metadata)
    engine.dispose()
    assert differences == []
    assert newest_version() == SCHEMA_VERSION


def test_the_migrations_are_packaged_with_the_program():
    versions = files("provisioning.registry") / "migrations" / "versions"
    assert "v0001_first_tables.py" in {file.name for file in versions.iterdir()}


async def test_no_secret_of_a_token_is_stored(tmp_path, path):
    url = await new_database(tmp_path)
    async with opened(url) as registry:
        await registry.create_psk(PUMP, NOW, OPERATOR)
    columns = {
        table.name: {column.name for column in table.columns}
        for table in metadata.sorted_tables
    }
    assert "hash" in columns["tokens"]
    assert not {"secret", "key", "psk", "token"} & columns["tokens"]
    assert not {"secret", "key", "psk"} & columns["credentials"]
