"""Plain HTTP on 8080: OCSP (RFC 6960, 5019), CRLs and CA certificates (RFC 5280)."""

from __future__ import annotations

import hashlib
from email.utils import format_datetime
from typing import TYPE_CHECKING

from aiohttp import web

from gateway.http.answers import error_answer
from gateway.http.protocol import read_body
from provisioning.ca.settings import CAS
from provisioning.model.errors import PeerError, Unavailable
from provisioning.model.refusals import METHOD_NOT_ALLOWED, OPERATION_UNKNOWN
from provisioning.x509.ocsp import request_from_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime
    from pathlib import Path

    from gateway.http.protocol import HttpLimits
    from provisioning.ca.publish import Publisher
    from provisioning.ca.settings import CaSettings

OCSP_TYPE = "application/ocsp-response"
CRL_TYPE = "application/pkix-crl"
CERTIFICATE_TYPE = "application/pkix-cert"


class RevocationApi:
    """What relying parties ask for; nobody proves anything here."""

    def __init__(
        self,
        publisher: Publisher,
        settings: CaSettings,
        limits: HttpLimits,
        *,
        clock: Callable[[], datetime],
        tell: Callable[[str, Mapping[str, object]], None],
    ) -> None:
        self._publisher = publisher
        self._settings = settings
        self._limits = limits
        self._clock = clock
        self._tell = tell
        self._files: dict[Path, tuple[tuple[int, int, int], bytes, str]] = {}

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; whatever goes wrong becomes an answer too."""
        try:
            return await self._answer(request)
        except Exception as error:  # noqa: BLE001 - the outermost shell of a request
            return error_answer(
                request, error, self._tell, device=None, address=request.remote or ""
            )

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        # Raw: in /ocsp/BASE64 a slash may be data, escaped or not (RFC 5019, 5).
        path = request.rel_url.raw_path
        get = request.method in ("GET", "HEAD")
        if path in ("/ocsp", "/ocsp/"):
            if request.method != "POST":
                raise PeerError(METHOD_NOT_ALLOWED)
            return await self._ocsp(
                request, await read_body(request, self._limits), cacheable=False
            )
        if not get:
            raise PeerError(METHOD_NOT_ALLOWED)
        if path.startswith("/ocsp/"):
            return await self._ocsp(
                request, request_from_path(path[6:]), cacheable=True
            )
        folder, _, name = path[1:].partition("/")
        stem, _, ending = name.rpartition(".")
        if stem in CAS and (folder, ending) == ("crl", "crl"):
            return self._file(request, "crl", stem)
        if stem in CAS and (folder, ending) == ("ca", "crt"):
            return self._file(request, "ca", stem)
        raise PeerError(OPERATION_UNKNOWN)

    async def _ocsp(
        self, request: web.BaseRequest, der: bytes, *, cacheable: bool
    ) -> web.Response:
        answer = await self._publisher.answer(der)
        headers = {"Content-Type": OCSP_TYPE}
        if cacheable and answer.this_update and answer.next_update:
            left = int((answer.next_update - self._clock()).total_seconds())
            tag = f'"{hashlib.sha256(answer.der).hexdigest()[:32]}"'
            headers |= {
                "ETag": tag,
                "Last-Modified": format_datetime(answer.this_update, usegmt=True),
                "Expires": format_datetime(answer.next_update, usegmt=True),
                "Cache-Control": f"max-age={max(left, 0)}, public, no-transform, "
                "must-revalidate",
            }
            if request.headers.get("If-None-Match") == tag:
                return web.Response(status=304, headers=headers)
        else:
            headers["Cache-Control"] = "no-store"
        return web.Response(body=answer.der, headers=headers)

    def _file(self, request: web.BaseRequest, kind: str, name: str) -> web.Response:
        path, media = (
            (self._settings.crl_path(name), CRL_TYPE)
            if kind == "crl"
            else (self._settings.certificate_path(name), CERTIFICATE_TYPE)
        )
        body, tag = self._content(path)
        headers = {
            "Content-Type": media,
            "ETag": tag,
            "Cache-Control": "max-age=300, public",
        }
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers=headers)
        return web.Response(body=body, headers=headers)

    def _content(self, path: Path) -> tuple[bytes, str]:
        """A file and its tag; all that ask for it share one copy in memory."""
        try:
            found = path.stat()
            seen = (found.st_mtime_ns, found.st_size, found.st_ino)
            kept = self._files.get(path)
            if kept is None or kept[0] != seen:
                body = path.read_bytes()
                tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
                kept = self._files[path] = (seen, body, tag)
        except OSError as error:
            raise Unavailable(path.name) from error
        return kept[1], kept[2]
