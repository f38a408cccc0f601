"""The time, never earlier than something that certainly was: devices have bad clocks.

A device without a battery wakes up in 1970, when no certificate is valid yet. The floor
is the latest moment that a verified gateway or an own certificate vouched for. It only
grows, and only by what was verified, or one wrong hour would be believed for ever.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from device_agent import files

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SPARE_THE_FLASH: Final = timedelta(hours=1)
"""The floor is written when it grows by more: an hour decides nothing, wear does."""

_LATEST: Final = datetime(2200, 1, 1, tzinfo=UTC)


def system_time() -> datetime:
    """What this device believes."""
    return datetime.now(UTC)


class Clock:
    """The system's time above a floor that is kept in a file."""

    def __init__(
        self,
        path: Path,
        disk: files.Disk,
        system: Callable[[], datetime] = system_time,
    ) -> None:
        self._path = path
        self._disk = disk
        self._system = system
        self._floor = self._read()
        self._written = self._floor

    def now(self) -> datetime:
        """The system's time or the floor, whichever is later."""
        now = self._system()
        return now if self._floor is None or now > self._floor else self._floor

    def raise_to(self, moment: datetime) -> None:
        """It is certainly not earlier than this. Raises OSError."""
        if moment > _LATEST or (self._floor is not None and moment <= self._floor):
            return
        self._floor = moment
        if self._written is None or moment - self._written > SPARE_THE_FLASH:
            self._disk.write_atomically(self._path, moment.isoformat().encode())
            self._written = moment

    def _read(self) -> datetime | None:
        content = files.read_private(self._path)
        try:
            moment = datetime.fromisoformat((content or b"").decode("ascii").strip())
        except ValueError:
            return None  # absent or damaged: without a floor is how every device began
        if moment.tzinfo is None or moment > _LATEST:
            return None
        return moment.astimezone(UTC)
