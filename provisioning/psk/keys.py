"""Proven PSK keys, kept for minutes, so that a device coming back spares the HSM."""

from __future__ import annotations

from collections import OrderedDict
from datetime import timedelta
from typing import TYPE_CHECKING

from typing_extensions import override

from provisioning.psk.derive import PskKey, derive

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from provisioning.hsm.token import Token
    from provisioning.model.ids import DeviceId, PskIdentity


class KeyCache:
    """The keys of identities that finished a handshake lately; bounded both ways.

    Only proven keys are kept: a stranger who sends a million identities evicts
    nobody, and no answer comes sooner for an identity because somebody guessed it.
    Owned by the event loop's thread.
    """

    def __init__(
        self,
        token: Token,
        *,
        clock: Callable[[], datetime],
        keep_for: timedelta,
        size: int,
    ) -> None:
        self._token = token
        self._clock = clock
        self._keep_for = keep_for
        self._size = size
        # In the order in which they end: a proof moves its key to the end.
        self._proven: OrderedDict[PskIdentity, tuple[datetime, PskKey]] = OrderedDict()
        # Derived for handshakes under way, until proven or given up; same shape.
        self._derived: OrderedDict[PskIdentity, tuple[datetime, PskKey]] = OrderedDict()

    @override
    def __repr__(self) -> str:
        return f"KeyCache({len(self._proven)} keys)"

    def cached(self, identity: PskIdentity) -> PskKey | None:
        """The key if it was proven lately; None sends the caller to `key_for`."""
        kept = self._proven.get(identity)
        return kept[1] if kept is not None and kept[0] > self._clock() else None

    async def key_for(self, identity: PskIdentity) -> PskKey:
        """The key, from memory if proven lately; else as `derive` does and raises."""
        self.expire()
        kept = self._proven.get(identity)
        if kept is not None:
            return kept[1]
        key = await derive(self._token, identity)
        _keep(self._derived, identity, key, self._clock() + _HANDSHAKE, self._size)
        return key

    def proven(self, identity: PskIdentity) -> None:
        """A handshake with this identity's key has finished: keep it a while."""
        found = self._derived.pop(identity, None) or self._proven.get(identity)
        if found is not None:
            end = self._clock() + self._keep_for
            _keep(self._proven, identity, found[1], end, self._size)

    def forget(self, device: DeviceId) -> None:
        """Drop a device's keys, when it was revoked or its generation superseded."""
        for kept in (self._proven, self._derived):
            for identity in [known for known in kept if known.device == device]:
                del kept[identity]

    def expire(self) -> None:
        """Drop what is over; also to be called now and then while nobody connects."""
        now = self._clock()
        for kept in (self._proven, self._derived):
            while kept:
                identity, (end, _) = next(iter(kept.items()))
                if end > now:
                    break
                del kept[identity]


_HANDSHAKE = timedelta(seconds=60)
"""Longer than any handshake's deadline."""


def _keep(
    kept: OrderedDict[PskIdentity, tuple[datetime, PskKey]],
    identity: PskIdentity,
    key: PskKey,
    end: datetime,
    size: int,
) -> None:
    kept.pop(identity, None)  # to the end: the dict is in the order of ends
    kept[identity] = (end, key)
    if len(kept) > size:
        kept.popitem(last=False)
