"""Standings in memory, so that a known device costs no question to the database.

An entry goes when this process writes to its device, and when a change that another
process wrote is applied. What was being read meanwhile is not kept either.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from provisioning.model.credentials import CredentialState, DeviceState
from provisioning.model.ids import PskIdentity, Serial
from provisioning.registry.rows import identity, standing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from provisioning.model.credentials import Standing
    from provisioning.registry.rows import CredentialRow, DeviceRow

Key = Serial | PskIdentity
"""What a peer's proof names a credential by."""


@dataclass(frozen=True, slots=True)
class Held:
    """A standing, and what else a connection is judged by.

    device: the row's number. ends_at: when its grace is over, in microseconds.
    """

    key: Key
    device: int
    folded: str
    standing: Standing
    connections: int
    ends_at: int | None
    not_after: int | None

    def at(self, now: int | None) -> Standing:
        """The standing at a time: grace may be over that no sweep has seen yet."""
        if now is None or self.ends_at is None or self.ends_at > now:
            return self.standing
        credential = self.standing.credential
        if credential.state is not CredentialState.ACTIVE:
            return self.standing
        ended = replace(credential, state=CredentialState.SUPERSEDED)
        return replace(self.standing, credential=ended)

    def settled(self, now: int) -> bool:
        """Whether one more connection changes nothing but when it was last seen."""
        return (
            self.connections > 1
            and (self.ends_at is None or self.ends_at > now)
            and (self.not_after is None or self.not_after >= now)
            and self.standing.credential.state is CredentialState.ACTIVE
            and self.standing.device_state is DeviceState.ENROLLED
        )


def held(row: CredentialRow, device: DeviceRow) -> Held:
    """An entry made from the rows."""
    key = row.serial if row.serial is not None else identity(row, device)
    return Held(
        key=key,
        device=device.id,
        folded=device.device.folded,
        standing=standing(row, device),
        connections=row.connections,
        ends_at=row.ends_at,
        not_after=row.not_after,
    )


class Standings:
    """The least recently used of at most `size` entries goes first."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._by_key: OrderedDict[Key, Held] = OrderedDict()
        self._by_credential: dict[int, Held] = {}
        self._by_device: dict[str, dict[Key, Held]] = {}
        self._readings: list[set[str]] = []
        self._everything = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, key: Key) -> Held | None:
        """The entry of a serial or PSK identity."""
        entry = self._by_key.get(key)
        if entry is not None:
            self._by_key.move_to_end(key)
        return entry

    def of_credential(self, number: int) -> Held | None:
        """The entry of a credential's row."""
        return self._by_credential.get(number)

    def put(self, entry: Held) -> None:
        """Keep this, in place of what was kept of the same credential."""
        old = self._by_key.pop(entry.key, None)
        if old is not None:
            self._unlink(old)
        elif len(self._by_key) >= self._size:
            self._unlink(self._by_key.popitem(last=False)[1])
        self._by_key[entry.key] = entry
        self._by_credential[entry.standing.credential.id] = entry
        self._by_device.setdefault(entry.folded, {})[entry.key] = entry

    def drop(self, folded: str) -> None:
        """Forget a device, also in what is being read at this moment."""
        for seen in self._readings:
            seen.add(folded)
        for entry in self._by_device.pop(folded, {}).values():
            del self._by_key[entry.key]
            self._by_credential.pop(entry.standing.credential.id, None)

    def clear(self) -> None:
        """Forget everything."""
        self._everything += 1
        self._by_key.clear()
        self._by_credential.clear()
        self._by_device.clear()

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """What is read inside may be put only where nothing changed meanwhile."""
        seen: set[str] = set()
        self._readings.append(seen)
        try:
            yield Reading(self, seen, self._everything)
        finally:
            # By identity: equal sets are common.
            self._readings = [one for one in self._readings if one is not seen]

    def still(self, everything: int) -> bool:
        """Whether nothing was cleared since."""
        return self._everything == everything

    def _unlink(self, entry: Held) -> None:
        self._by_credential.pop(entry.standing.credential.id, None)
        of_device = self._by_device.get(entry.folded)
        if of_device is not None:
            of_device.pop(entry.key, None)
            if not of_device:
                del self._by_device[entry.folded]


class Reading:
    """One look at the database, during which other things may happen."""

    def __init__(self, standings: Standings, seen: set[str], everything: int) -> None:
        self._standings = standings
        self._dropped = seen
        self._everything = everything

    def put(self, entry: Held) -> None:
        """Keep what was read, unless it may be older than what was dropped."""
        if entry.folded not in self._dropped and self._standings.still(
            self._everything
        ):
            self._standings.put(entry)
