"""Answers over HTTP: documents, refusals in words (RFC 9457), and incidents."""

from __future__ import annotations

import json
import secrets
import traceback
from typing import TYPE_CHECKING

from aiohttp import web

from provisioning.model.errors import (
    OutcomeUnknown,
    PeerError,
    Unavailable,
    Unusable,
)
from provisioning.model.events import INCIDENT, REFUSED
from provisioning.model.refusals import (
    AWAY,
    IN_PROGRESS,
    INTERNAL,
    OUT_OF_ORDER,
    Refusal,
)
from provisioning.wire.problems import problem, problem_body

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

RETRY_S = 5.0
"""For refusals that will not last and say nothing better."""


def document(content: Mapping[str, object]) -> web.Response:
    """A JSON document."""
    return web.Response(
        # A line: tools that print what comes after would run into it.
        body=json.dumps(content).encode() + b"\n",
        headers={"Content-Type": "application/json", "Cache-Control": "no-store"},
    )


def bytes_of(media: str, body: bytes, **headers: str) -> web.Response:
    """A body of that media type."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return web.Response(body=body, headers={"Content-Type": media, **named})


def refusal_answer(
    request: web.BaseRequest,
    refusal: Refusal,
    detail: str,
    *,
    retry_after_s: float | None = None,
    incident: str | None = None,
) -> web.Response:
    """The refusal as problem details, or as its sentence for those that want text."""
    headers: dict[str, str] = {"Cache-Control": "no-store"}
    if refusal.http == 401:  # noqa: PLR2004 - Unauthorized
        headers["WWW-Authenticate"] = 'Basic realm="estrealm"'
    if refusal.retryable:
        headers["Retry-After"] = str(max(1, round(retry_after_s or RETRY_S)))
    if _wants_text(request):
        headers["Content-Type"] = "text/plain; charset=utf-8"
        mark = f" (incident {incident})" if incident else ""
        body = f"{detail}{mark}\n".encode()
    else:
        headers["Content-Type"] = "application/problem+json"
        body = problem_body(
            problem(refusal, detail, retry_after_s=retry_after_s, incident=incident)
        )
    return web.Response(status=refusal.http, body=body, headers=headers)


def _wants_text(request: web.BaseRequest) -> bool:
    """Text for those that ask for it, or for nothing (STANDARDS, EST)."""
    accept = request.headers.get("Accept")
    if accept is None:
        return True
    return "text/plain" in accept and "json" not in accept


def error_answer(
    request: web.BaseRequest,
    error: Exception,
    tell: Callable[[str, Mapping[str, object]], None],
    *,
    device: str | None,
    address: str,
) -> web.Response:
    """What an error of any kind becomes for the peer, told once to the log."""
    match error:
        case PeerError(refusal=refusal, detail=detail):
            tell(
                REFUSED,
                {
                    "code": refusal.code,
                    "device": device,
                    "address": address,
                    "operation": request.path[:100],
                },
            )
            return refusal_answer(request, refusal, detail)
        case Unavailable(what=what, retry_after_s=retry_after_s):
            detail = f"{what} is away for the moment; come back after the time given."
            return refusal_answer(request, AWAY, detail, retry_after_s=retry_after_s)
        case OutcomeUnknown():
            return refusal_answer(request, IN_PROGRESS, IN_PROGRESS.sentence)
        case Unusable(what=what, why=why):
            incident = secrets.token_hex(4)
            tell(
                INCIDENT,
                {"incident": incident, "where": what, "error": why, "stack": None},
            )
            return refusal_answer(
                request, OUT_OF_ORDER, OUT_OF_ORDER.sentence, incident=incident
            )
        case _:
            incident = secrets.token_hex(4)
            tell(
                INCIDENT,
                {
                    "incident": incident,
                    "where": request.path[:100],
                    "error": type(error).__name__,
                    "stack": "".join(traceback.format_exception(error)),
                },
            )
            return refusal_answer(
                request, INTERNAL, INTERNAL.sentence, incident=incident
            )
