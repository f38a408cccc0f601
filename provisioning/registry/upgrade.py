"""Brings a registry to this program's schema; the only way that one is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError

from provisioning.model.errors import Unusable
from provisioning.registry.engine import fault, make_file, writer_engine

if TYPE_CHECKING:
    from sqlalchemy import Connection


async def upgrade(url: str) -> None:
    """Create or migrate; nothing happens to a registry that is already there.

    All in one transaction: a power cut leaves the old schema or the new one. Raises
    Unavailable while another process writes, Unusable for a schema that is newer.
    """
    make_file(url)
    engine = writer_engine(url)
    try:
        async with engine.begin() as connection:
            await connection.run_sync(_upgrade)
    except CommandError as error:
        raise Unusable(
            "registry", f"its schema is not one of this program's ({error})"
        ) from error
    except (DBAPIError, OSError) as error:
        raise fault(error) from error
    finally:
        await engine.dispose()


def newest_version() -> str | None:
    """The newest migration that is packaged with this program."""
    return ScriptDirectory.from_config(_config()).get_current_head()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "provisioning.registry:migrations")
    return config


def _upgrade(connection: Connection) -> None:
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
