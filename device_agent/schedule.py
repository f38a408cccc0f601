"""When to renew and when to try again; randomness comes in as a share from 0 to 1."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import MAXYEAR, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime

LONGEST_RETRY_AFTER = timedelta(days=1)
"""No gateway may send a device away for longer: it might be a mistake, or a lie."""

_EXPONENT_LIMIT = 30


@dataclass(frozen=True, slots=True)
class RenewRule:
    """At which share of its lifetime a credential is renewed, as the gateway says.

    at: 0.1 to 0.95. jitter: how far from it devices are spread, both ways.
    """

    at: float = 2 / 3
    jitter: float = 0.05

    @classmethod
    def within_reason(cls, at: object, jitter: object) -> RenewRule:
        """The rule, or its nearest sane neighbour: the numbers come from outside."""
        default = cls()
        return cls(
            _clamped(at, 0.1, 0.95, default.at),
            _clamped(jitter, 0.0, 0.25, default.jitter),
        )


@dataclass(frozen=True, slots=True)
class Pace:
    """How quickly to try again: full jitter below a ceiling that doubles.

    first: the first ceiling. longest: the last. (The shape is that of AWS's
    "Exponential Backoff and Jitter": it spreads a fleet that lost its gateway best.)
    """

    first: timedelta
    longest: timedelta

    def pause(
        self, attempt: int, roll: float, retry_after: timedelta | None = None
    ) -> timedelta:
        """How long to wait after attempt number `attempt` (1, 2, …) failed.

        roll: 0 to 1, at random. A `retry_after` is obeyed: it is the least, and the
        jitter comes on top, or all would come back together.
        """
        doublings = min(max(attempt - 1, 0), _EXPONENT_LIMIT)
        ceiling: timedelta = min(self.longest, self.first * (1 << doublings))
        jitter = ceiling * min(max(roll, 0.0), 1.0)
        if retry_after is None:
            return jitter
        least = min(max(retry_after, timedelta(0)), LONGEST_RETRY_AFTER)
        return least + jitter


RENEWAL = Pace(first=timedelta(seconds=4), longest=timedelta(hours=1))
LINK = Pace(first=timedelta(seconds=4), longest=timedelta(minutes=5))
LINK_REFUSED = Pace(first=timedelta(seconds=30), longest=timedelta(hours=1))


def pause_after_refusal(roll: float) -> timedelta:
    """How long to leave a gateway alone that said no: an operator must act first."""
    return timedelta(minutes=10) + timedelta(hours=6) * min(max(roll, 0.0), 1.0)


def renewal_time(
    not_before: datetime | None,
    not_after: datetime | None,
    rule: RenewRule,
    roll: float,
) -> datetime | None:
    """The moment to renew a credential; None when it has no end.

    roll: 0 to 1, drawn once for each credential, so that a restart moves nothing.
    """
    if not_before is None or not_after is None or not_after.year == MAXYEAR:
        return None  # 99991231235959Z: no end date (RFC 5280, 4.1.2.5)
    share = rule.at + rule.jitter * (2 * min(max(roll, 0.0), 1.0) - 1)
    return not_before + (not_after - not_before) * min(max(share, 0.05), 0.98)


def _clamped(value: object, low: float, high: float, otherwise: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return otherwise
    return min(max(float(value), low), high) if value == value else otherwise  # noqa: PLR0124 - NaN is not itself
