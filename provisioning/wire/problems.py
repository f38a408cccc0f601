"""Refusals as problem details, written by the gateway, read by the agent (RFC 9457)."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from provisioning.model.refusals import Refusal

PROBLEM_TYPE = "application/problem+json"

MAX_PROBLEM = 16_384
"""Octets of a problem that the agent reads; ours have some hundred."""
MAX_DETAIL = 500
"""Characters of a detail that are kept."""

_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")


def problem(
    refusal: Refusal,
    detail: str | None = None,
    *,
    retry_after_s: float | None = None,
    incident: str | None = None,
) -> dict[str, object]:
    """The members of a problem, ready for JSON or CBOR.

    detail: the sentence for this case, the refusal's own if None; never a secret.
    retry_after_s: in whole seconds beside the header, for carriers that have none.
    """
    members: dict[str, object] = {
        # `code` is what tells problems apart (RFC 9457, 4.2.1).
        "type": "about:blank",
        "title": HTTPStatus(refusal.http).phrase,
        "status": refusal.http,
        "detail": detail or refusal.sentence,
        "code": refusal.code,
        "retryable": refusal.retryable,
    }
    if retry_after_s is not None:
        members["retry_after"] = max(1, math.ceil(retry_after_s))
    if incident is not None:
        members["incident"] = incident
    return members


def problem_body(members: dict[str, object]) -> bytes:
    """The JSON of `problem`, as `application/problem+json`."""
    return json.dumps(members, ensure_ascii=False).encode()


@dataclass(frozen=True, slots=True)
class ProblemSeen:
    """What a peer's problem says, as far as it can be believed.

    retryable: None where it does not say. detail: one line, printable.
    """

    code: str
    detail: str
    retryable: bool | None
    retry_after_s: float | None = None


def read_problem(body: bytes) -> ProblemSeen | None:
    """A problem as the agent reads it; None for anything else, of any size."""
    if len(body) > MAX_PROBLEM:
        return None
    try:
        members = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(members, dict):
        return None
    code = members.get("code")
    if not isinstance(code, str) or _CODE.fullmatch(code) is None:
        return None
    detail, retryable = members.get("detail"), members.get("retryable")
    return ProblemSeen(
        code=code,
        detail=_line(detail) if isinstance(detail, str) else "",
        retryable=retryable if isinstance(retryable, bool) else None,
        retry_after_s=_seconds(members.get("retry_after")),
    )


def _line(text: str) -> str:
    # It ends on a terminal and in a log: no escape sequences, no second line.
    shown = "".join(c if c.isprintable() else " " for c in text[:MAX_DETAIL])
    return shown.strip()


def _seconds(value: object) -> float | None:
    """From 0 to a day; None for what is no number of seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    day_s = 86_400.0
    return min(float(value), day_s) if 0 <= value <= 1e18 else None  # noqa: PLR2004 - beyond is no time at all
