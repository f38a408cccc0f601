"""What the agent asks of the gateway over HTTPS: EST (RFC 7030) and the device API.

Two types for two kinds of connection: an `UnverifiedGateway` can only be asked for its
CA certificates, so no secret can be given to a server that nobody has checked.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from device_agent.address import parse_endpoint
from device_agent.failures import NotNowError, RefusedError
from device_agent.schedule import RenewRule
from device_agent.slots import read_psk
from provisioning.model.errors import PeerError
from provisioning.wire import est as wire
from provisioning.wire.problems import read_problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from device_agent.http import Answer, HttpConnection
    from provisioning.model.ids import DeviceId
    from provisioning.tls.context import ClientPsk

EST: Final = "/.well-known/est"
OK: Final = 200
ACCEPTED: Final = 202
BAD_REQUEST: Final = 400
SERVER_SIDE: Final = 500
COME_BACK: Final = frozenset({ACCEPTED, 408, 425, 429, 503})


@dataclass(frozen=True, slots=True)
class WhoAmI:
    """Who the gateway takes this connection for. auth: None for nobody."""

    device: str | None
    auth: str | None
    serial: str | None
    generation: int | None
    not_after: datetime | None
    rotate: bool


@dataclass(frozen=True, slots=True)
class Config:
    """What a device need be told. time: the gateway's."""

    mqtts: str | None
    rule: RenewRule
    time: datetime | None


class UnverifiedGateway:
    """A server that might be anybody."""

    def __init__(self, http: HttpConnection) -> None:
        self._http = http

    async def cacerts(self) -> list[bytes]:
        """The CA certificates it offers, as DER: to be compared with a pin."""
        answer = _judged(await self._http.ask("GET", f"{EST}/cacerts"))
        return _certificates(answer)

    async def close(self) -> None:
        """End the connection."""
        await self._http.close()


class Gateway(UnverifiedGateway):
    """The gateway, verified. Raises RefusedError and NotNowError only.

    vouched_until: when its certificate ends, None if it showed none (resumption).
    """

    def __init__(
        self, http: HttpConnection, vouched_until: datetime | None = None
    ) -> None:
        super().__init__(http)
        self.vouched_until = vouched_until

    async def simple_enroll(
        self, request_der: bytes, login: tuple[DeviceId, str] | None
    ) -> list[bytes]:
        """The first certificate (RFC 7030, 4.2.1).

        login: device and enrolment token; None where TLS has proved the device.
        """
        headers = []
        if login is not None:
            secret = base64.b64encode(f"{login[0]}:{login[1]}".encode()).decode()
            headers = [("Authorization", f"Basic {secret}")]
        return await self._ask_for_certificate("simpleenroll", request_der, headers)

    async def simple_reenroll(self, request_der: bytes) -> list[bytes]:
        """The next certificate, proved by the present one (RFC 7030, 4.2.2)."""
        return await self._ask_for_certificate("simplereenroll", request_der, [])

    async def next_psk(self) -> ClientPsk:
        """The next generation of this device's PSK; asked again, the same."""
        answer = _judged(await self._http.ask("POST", "/device/v1/psk"))
        try:
            return read_psk(answer.body)
        except (ValueError, RecursionError) as error:
            raise _nonsense("a PSK") from error

    async def whoami(self) -> WhoAmI:
        """Who the gateway takes us for."""
        told = _document(_judged(await self._http.ask("GET", "/device/v1/whoami")))
        generation = told.get("generation")
        return WhoAmI(
            _text(told, "device"),
            _text(told, "auth"),
            _text(told, "serial"),
            generation if isinstance(generation, int) else None,
            _moment(told, "not_after"),
            told.get("rotate") is True,
        )

    async def config(self) -> Config:
        """Endpoints, when to renew, what time it is."""
        told = _document(_judged(await self._http.ask("GET", "/device/v1/config")))
        endpoints, renew = told.get("endpoints"), told.get("renew")
        mqtts = endpoints.get("mqtts") if isinstance(endpoints, dict) else None
        renew = renew if isinstance(renew, dict) else {}
        try:
            if mqtts is not None:
                parse_endpoint(str(mqtts), "mqtts")
        except ValueError as error:
            raise _nonsense("its MQTT address") from error
        return Config(
            None if mqtts is None else str(mqtts),
            RenewRule.within_reason(renew.get("at"), renew.get("jitter")),
            _moment(told, "time"),
        )

    async def _ask_for_certificate(
        self, operation: str, request_der: bytes, headers: list[tuple[str, str]]
    ) -> list[bytes]:
        answer = await self._http.ask(
            "POST",
            f"{EST}/{operation}",
            headers=[("Content-Type", "application/pkcs10"), *headers],
            body=wire.encode_body(request_der),
        )
        return _certificates(_judged(answer))


def _judged(answer: Answer) -> Answer:
    """The answer if it is one; else who must act, by what the gateway says."""
    if answer.status == OK:
        return answer
    problem = read_problem(answer.body) if answer.status >= BAD_REQUEST else None
    sentence = f"the gateway answered {answer.status}"
    retry_after = answer.retry_after
    refused = BAD_REQUEST <= answer.status < SERVER_SIDE
    if answer.status == ACCEPTED:
        sentence = "the gateway works on it; ask again"
    if problem is not None:
        sentence = problem.detail or sentence
        refused = refused if problem.retryable is None else not problem.retryable
        if retry_after is None and problem.retry_after_s is not None:
            retry_after = timedelta(seconds=problem.retry_after_s)
    if refused and answer.status not in COME_BACK:
        code = problem.code if problem else f"http_{answer.status}"
        raise RefusedError(code, sentence)
    raise NotNowError(sentence, retry_after=retry_after)


def _certificates(answer: Answer) -> list[bytes]:
    try:
        found = wire.read_certs_only(wire.decode_answer(answer.body))
    except PeerError as error:
        raise _nonsense("certificates") from error
    if not found:
        raise _nonsense("certificates")
    return found


def _document(answer: Answer) -> Mapping[str, object]:
    try:
        document = json.loads(answer.body)
    except (ValueError, RecursionError) as error:
        raise _nonsense("JSON") from error
    if not isinstance(document, dict):
        raise _nonsense("JSON")
    return document


def _text(told: Mapping[str, object], name: str) -> str | None:
    value = told.get(name)
    return value if isinstance(value, str) else None


def _moment(told: Mapping[str, object], name: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(_text(told, name) or "")
        return moment.astimezone(UTC) if moment.tzinfo else None
    except (ValueError, OverflowError):
        return None


def _nonsense(what: str) -> NotNowError:
    text = f"the gateway's answer should hold {what}, but does not"
    return NotNowError(text, retry_after=timedelta(seconds=30))
