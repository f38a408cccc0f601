"""Where an operator's command works: configuration, registry, token when needed."""

from __future__ import annotations

import contextlib
import getpass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from provisioning import config as configuration
from provisioning.registry.store import Registry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from provisioning.config import Config
    from provisioning.hsm.token import Token


class Desk:
    """One command's view of the data directory; the token is opened at first need."""

    def __init__(
        self,
        config: Config,
        registry: Registry,
        actor: str,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        self.config = config
        self.registry = registry
        self.actor = actor
        self._stack = stack
        self._token: Token | None = None

    @property
    def now(self) -> datetime:
        """The time of the command."""
        return datetime.now(UTC)

    async def token(self) -> Token:
        """The HSM's token; Unavailable or Unusable as it is."""
        if self._token is None:
            # Not before it is needed: it loads the module and logs in.
            from gateway.parts import token_config  # noqa: PLC0415
            from provisioning.hsm.pkcs11 import open_token  # noqa: PLC0415

            self._token = await open_token(token_config(self.config))
            self._stack.push_async_callback(self._token.close)
        return self._token


@contextlib.asynccontextmanager
async def open_desk(folder: Path) -> AsyncIterator[Desk]:
    """Read the configuration, open the registry, close both at the end."""
    config = configuration.load(folder)
    async with contextlib.AsyncExitStack() as stack:
        registry = await Registry.open(config.registry_url)
        stack.push_async_callback(registry.close)
        yield Desk(config, registry, f"cli:{_user()}", stack)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
