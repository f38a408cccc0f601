"""Who is connected at the moment, so that a revocation can cut them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from provisioning.model.ids import DeviceId, PskIdentity, Serial
    from provisioning.model.refusals import Refusal


@dataclass(frozen=True, slots=True, eq=False)
class Connection:
    """One live connection of a device.

    credential: what it proved itself by. cut: ends it, in its protocol's words.
    """

    device: DeviceId
    credential: Serial | PskIdentity
    cut: Callable[[Refusal], None]


class Live:
    """Connections by device. Owned by the event loop's thread."""

    def __init__(self) -> None:
        # The inner dict is a set in the order of arrival.
        self._by_device: dict[DeviceId, dict[Connection, None]] = {}

    def add(self, connection: Connection) -> None:
        """A device has proved itself on a connection."""
        self._by_device.setdefault(connection.device, {})[connection] = None

    def remove(self, connection: Connection) -> None:
        """The connection is gone; nothing happens if it is not here."""
        found = self._by_device.get(connection.device)
        if found is not None:
            found.pop(connection, None)
            if not found:
                del self._by_device[connection.device]

    def of(self, device: DeviceId) -> tuple[Connection, ...]:
        """The device's connections, the oldest first."""
        return tuple(self._by_device.get(device, ()))

    def everyone(self) -> tuple[Connection, ...]:
        """All connections of all devices."""
        return tuple(c for found in self._by_device.values() for c in found)

    def __len__(self) -> int:
        return sum(len(found) for found in self._by_device.values())
