"""EST over HTTPS (RFC 7030, corrected by RFC 8951): bytes to message and back."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING

from gateway.http.answers import bytes_of
from gateway.peers import admitted
from provisioning.enrol.admission import StandingProof, TokenProof
from provisioning.enrol.tokens import token_proof
from provisioning.model.errors import PeerError
from provisioning.model.events import RAW_DER
from provisioning.model.refusals import (
    CREDENTIAL_EXPIRED,
    CREDENTIAL_MISSING,
    MEDIA_TYPE,
    METHOD_NOT_ALLOWED,
    OPERATION_NOT_BUILT,
    OPERATION_UNKNOWN,
    PROFILE_UNKNOWN,
    TOKEN_REFUSED,
)
from provisioning.tls.engine import ServerEngine
from provisioning.wire import est

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiohttp import web

    from gateway.http.device import Asked
    from provisioning.ca.hierarchy import Hierarchy
    from provisioning.enrol.answer import Enrolment
    from provisioning.x509.profiles import Profile

EST_PREFIX = "/.well-known/est/"
MAX_AUTHORIZATION = 512
"""Octets of an Authorization header that are looked at: a device ID and a token."""


class Est:
    """The operations, by name; a label before one names a profile."""

    def __init__(
        self,
        enrolment: Enrolment,
        hierarchy: Hierarchy,
        profiles: Mapping[str, Profile],
        tell: Callable[[str, Mapping[str, object]], None],
    ) -> None:
        self._enrolment = enrolment
        self._profiles = profiles
        self._tell = tell
        self._cacerts = {
            issuer: est.encode_body(est.certs_only(hierarchy.chain_for(issuer)))
            for issuer in hierarchy.issuers
        }

    async def answer(self, asked: Asked, path: str, body: bytes) -> web.Response:
        """Answer the operation at this path."""
        label, operation = self._split(path)
        match operation, asked.request.method:
            case "cacerts", "GET" | "HEAD":
                return self._certificates(label)
            case "csrattrs", "GET" | "HEAD":
                return bytes_of(est.CSRATTRS_TYPE, est.encode_body(est.CSRATTRS))
            case "simpleenroll", "POST":
                return await self._simple_enroll(asked, label, body)
            case "simplereenroll", "POST":
                return await self._simple_reenroll(asked, label, body)
            case "serverkeygen" | "fullcmc", "POST":
                raise PeerError(OPERATION_NOT_BUILT)
            case (
                (
                    "cacerts"
                    | "csrattrs"
                    | "simpleenroll"
                    | "simplereenroll"
                    | "serverkeygen"
                    | "fullcmc"
                ),
                _,
            ):
                raise PeerError(METHOD_NOT_ALLOWED)
            case _:
                raise PeerError(OPERATION_UNKNOWN)

    def _split(self, path: str) -> tuple[str | None, str]:
        parts = path.removeprefix(EST_PREFIX).split("/")
        if len(parts) == 1:
            return None, parts[0]
        if len(parts) != 2:  # noqa: PLR2004 - label and operation
            raise PeerError(OPERATION_UNKNOWN)
        if parts[0] not in self._profiles:
            raise PeerError(PROFILE_UNKNOWN)
        return parts[0], parts[1]

    def _certificates(self, label: str | None) -> web.Response:
        issuer = self._profiles[label or "ldevid"].issuer
        return bytes_of(est.CERTS_ONLY_TYPE, self._cacerts[issuer])

    async def _simple_enroll(
        self, asked: Asked, label: str | None, body: bytes
    ) -> web.Response:
        proof = _proof(asked)
        der = await self._enrolment.simple_enroll(
            self._csr(asked, body), proof, label, bindings=_bindings(asked)
        )
        return _issued(der)

    async def _simple_reenroll(
        self, asked: Asked, label: str | None, body: bytes
    ) -> web.Response:
        # An expired one is judged by its profile's grace (DESIGN, The way back).
        standing = admitted(asked.peer, despite=CREDENTIAL_EXPIRED)
        der = await self._enrolment.simple_reenroll(
            self._csr(asked, body), standing, label, bindings=_bindings(asked)
        )
        return _issued(der)

    def _csr(self, asked: Asked, body: bytes) -> bytes:
        media = asked.request.content_type
        if body and media not in (est.PKCS10_TYPE, "application/octet-stream"):
            raise PeerError(MEDIA_TYPE)
        decoded = est.decode_body(body)
        if not decoded.was_base64:
            device = asked.peer.standing if asked.peer else None
            self._tell(
                RAW_DER,
                {
                    "device": device.credential.device.text if device else None,
                    "operation": asked.request.path[:100],
                },
            )
        return decoded.der


def _issued(der: bytes) -> web.Response:
    return bytes_of(est.CERTS_ONLY_TYPE, est.encode_body(est.certs_only([der])))


def _proof(asked: Asked) -> TokenProof | StandingProof:
    """How the request proves itself: by token if it brings one, else by TLS."""
    header = asked.request.headers.get("Authorization")
    if header is not None:
        return _token(header)
    return StandingProof(admitted(asked.peer))


def _token(header: str) -> TokenProof:
    """HTTP Basic (RFC 7617): the device ID, and the enrolment token as password."""
    scheme, _, encoded = header.partition(" ")
    if scheme.lower() != "basic" or len(encoded) > MAX_AUTHORIZATION:
        raise PeerError(CREDENTIAL_MISSING)
    try:
        text = base64.b64decode(encoded.strip(), validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        raise PeerError(CREDENTIAL_MISSING) from None
    name, mark, secret = text.partition(":")
    if not mark or not secret:
        raise PeerError(TOKEN_REFUSED)
    return token_proof(name, secret)


def _bindings(asked: Asked) -> Callable[[], tuple[str, ...]]:
    def found() -> tuple[str, ...]:
        engine = asked.transport.engine
        if not isinstance(engine, ServerEngine):
            return ()
        return tuple(
            base64.b64encode(one).decode() for one in engine.channel_bindings()
        )

    return found
