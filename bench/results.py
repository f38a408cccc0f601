"""What a measurement came to: its figures, its table and its JSON document."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, TextIO

from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Sequence

RATE = "/CPU-s"


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked for (issue 3). at_least, at_most: of the value; ratio: of it."""

    at_least: float | None = None
    at_most: float | None = None
    ratio: float | None = None

    @override
    def __str__(self) -> str:
        parts = []
        if self.at_least is not None:
            parts.append(f">= {self.at_least:,.0f}")
        if self.at_most is not None:
            parts.append(f"<= {self.at_most:,.0f}")
        if self.ratio is not None:
            parts.append(f"x >= {self.ratio:g}")
        return ", ".join(parts)

    def met(self, result: Result) -> bool:
        """Whether the figures reach it."""
        return (
            (self.at_least is None or result.value >= self.at_least)
            and (self.at_most is None or result.value <= self.at_most)
            and (self.ratio is None or (result.ratio or 0) >= self.ratio)
        )


TARGETS = {
    "enrol.fresh": Target(at_least=700, ratio=1.0),
    "enrol.kept": Target(at_least=1_800),
    "connect.mtls13": Target(ratio=0.5),
    "connect.resumed13": Target(ratio=0.5),
    "connect.psk13": Target(ratio=0.5),
    "connect.psk12": Target(ratio=0.5),
    "mqtt.connect": Target(ratio=2.0),
    "idle.mqtt": Target(at_most=60),
    "agent.rss": Target(at_most=40),
}


@dataclass(frozen=True, slots=True)
class Result:
    """One line. more: what else is worth knowing, shown below the table."""

    name: str
    value: float
    low: float
    high: float
    unit: str
    peer: tuple[str, float] | None = None
    ratio: float | None = None
    more: dict[str, object] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """As DESIGN fixes it."""
        return {
            "name": self.name,
            "value": _short(self.value),
            "unit": self.unit,
            "low": _short(self.low),
            "high": _short(self.high),
            "peer": (
                {"name": self.peer[0], "value": _short(self.peer[1])}
                if self.peer
                else None
            ),
            "ratio": None if self.ratio is None else round(self.ratio, 3),
        }


def spread(
    name: str,
    values: Sequence[float],
    unit: str,
    peer: tuple[str, Sequence[float]] | None = None,
    more: dict[str, object] | None = None,
) -> Result:
    """Median with low and high; the ratio is the median of the rounds' ratios."""
    beside = ratio = None
    if peer is not None:
        beside = (peer[0], median(peer[1]))
        pairs = [a / b for a, b in zip(values, peer[1], strict=True) if b]
        ratio = median(pairs) if pairs else None
    return Result(
        name,
        median(values),
        min(values),
        max(values),
        unit,
        beside,
        ratio,
        more or {},
    )


def document(results: Sequence[Result]) -> str:
    """The JSON document of `script/bench --json`."""
    return json.dumps({"results": [one.as_json() for one in results]}, indent=2)


COLUMNS = (
    "name",
    "value",
    "low",
    "high",
    "unit",
    "peer",
    "peer's",
    "ratio",
    "target",
    "met",
)


def print_table(results: Sequence[Result], out: TextIO) -> None:
    """Plain columns, and what else is worth knowing below them."""
    rows = [COLUMNS, *(_row(one) for one in results)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(COLUMNS))]
    numbers = {1, 2, 3, 6, 7}
    for row in rows:
        cells = (
            cell.rjust(width) if n in numbers else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        out.write("  ".join(cells).rstrip() + "\n")
    for one in results:
        out.writelines(
            f"{one.name}: {what} {value}\n" for what, value in one.more.items()
        )


def _row(one: Result) -> tuple[str, ...]:
    target = TARGETS.get(one.name)
    return (
        one.name,
        _shown(one.value),
        _shown(one.low),
        _shown(one.high),
        one.unit,
        one.peer[0] if one.peer else "-",
        _shown(one.peer[1]) if one.peer else "-",
        "-" if one.ratio is None else f"{one.ratio:.2f}",
        str(target or "-"),
        "-" if target is None else ("yes" if target.met(one) else "NO"),
    )


def _short(number: float) -> float:
    return round(number, 1 if abs(number) >= 10 else 3)  # noqa: PLR2004 - 3 figures


def _shown(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"  # noqa: PLR2004
