"""Programs that nobody here wrote, as devices: curl, openssl, and what they keep."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from gateway.operators import actions

if TYPE_CHECKING:
    from pathlib import Path

    from gateway_process import GatewayProcess

PACKAGES = {
    "curl": "curl",
    "openssl": "openssl",
    "pki": "strongswan-pki libstrongswan-extra-plugins",
    "mosquitto_pub": "mosquitto-clients",
    "mosquitto_sub": "mosquitto-clients",
    "gnutls-cli": "gnutls-bin",
}
PEM = re.compile(
    r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n", re.DOTALL
)
WHOAMI = (
    "GET /device/v1/whoami HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
)
PSK_SUITES = "ECDHE-PSK-CHACHA20-POLY1305:ECDHE-PSK-AES128-CBC-SHA256"


def program(name: str) -> str:
    """Its path; the test is skipped where the machine lacks it."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}: apt-get install {PACKAGES[name]}")
    return found


def run(name: str, *argv: object, give: bytes = b"", code: int | None = 0) -> bytes:
    """Run a program to its end; its standard output. code: None for whatever."""
    done = subprocess.run(
        [program(name), *map(str, argv)],
        input=give,
        capture_output=True,
        timeout=15,
        check=False,
    )
    assert code is None or done.returncode == code, (
        argv,
        done.returncode,
        done.stdout[-2000:],
        done.stderr[-2000:],
    )
    return done.stdout if code == 0 else done.stdout + done.stderr


def openssl(*argv: object, give: bytes = b"", code: int | None = 0) -> str:
    return run("openssl", *argv, give=give, code=code).decode(errors="replace")


@dataclass(frozen=True)
class Fetched:
    """What curl got."""

    status: int
    headers: str
    body: bytes
    said: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.body)


class Site:
    """A gateway, its trust anchors in a file, and a folder to work in."""

    def __init__(self, gateway: GatewayProcess, folder: Path) -> None:
        self.gateway = gateway
        self.folder = folder
        self.root, self.issuing, self.factory = (
            self._pem(name) for name in ("root", "issuing", "factory")
        )

    def _pem(self, name: str) -> Path:
        path = self.folder / f"{name}.pem"
        der = self.gateway.certificate(name)
        openssl("x509", "-inform", "DER", "-in", der, "-out", path)
        return path

    def curl(self, path: str, *argv: object, listener: str = "https") -> Fetched:
        head = self.folder / "head"
        done = subprocess.run(
            [
                *(program("curl"), "-sS", "-v", "-m", "12", "--cacert", str(self.root)),
                *("-D", str(head), *map(str, argv), self.gateway.url(path, listener)),
            ],
            capture_output=True,
            timeout=15,
            check=False,
        )
        said = done.stderr.decode(errors="replace")
        assert done.returncode == 0, said
        blocks = re.split(r"\r?\n\r?\n", head.read_text().strip())
        status = int(blocks[-1].split()[1])
        return Fetched(status, blocks[-1].lower(), done.stdout, said)

    def s_client(
        self, *argv: object, request: str = WHOAMI, listener: str = "https"
    ) -> str:
        """Everything that `openssl s_client` prints, whatever it ends with."""
        port = self.gateway.ready[listener]
        return openssl(
            "s_client",
            *("-connect", f"127.0.0.1:{port}", "-servername", "localhost"),
            *("-CAfile", self.root, "-ign_eof", *argv),
            give=request.encode(),
            code=None,
        )

    def psk(self, device: OpensslDevice) -> dict[str, str]:
        """The device's next PSK, asked for with its certificate."""
        got = self.curl("/device/v1/psk", "-X", "POST", *device.mtls)
        assert got.status == 200, got
        return got.document

    def device(self, name: str) -> OpensslDevice:
        return OpensslDevice(self, name)

    def revoke(self, name: str, reason: str = "keyCompromise") -> dict[str, Any]:
        """As `devices revoke`."""
        return self.gateway.operate_now(
            lambda desk: actions.revoke_device(desk, name, serial=None, reason=reason)
        )

    def rotate(self, name: str) -> dict[str, Any]:
        """As `devices rotate`."""
        return self.gateway.operate_now(
            lambda desk: actions.rotate_device(desk, name, within=actions.ROTATE_WITHIN)
        )


class OpensslDevice:
    """A key and a request made by openssl, a certificate fetched by curl."""

    def __init__(self, site: Site, name: str) -> None:
        self.site, self.name = site, name
        self.folder = site.folder / name
        self.folder.mkdir(exist_ok=True)
        self.key, self.csr, self.cert = (
            self.folder / one for one in ("key.pem", "csr.der", "cert.pem")
        )
        openssl(
            *("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *(
                "-nodes",
                "-keyout",
                self.key,
                "-subj",
                f"/serialNumber={name}/CN={name}",
            ),
            *("-outform", "DER", "-out", self.csr),
        )

    @property
    def mtls(self) -> tuple[object, ...]:
        """How curl and mosquitto prove it."""
        return ("--cert", self.cert, "--key", self.key)

    @property
    def s_client(self) -> tuple[object, ...]:
        return ("-cert", self.cert, "-key", self.key)

    @property
    def serial(self) -> str:
        told = openssl("x509", "-in", self.cert, "-noout", "-serial")
        return told.strip().partition("=")[2].lower()

    def ask(
        self, operation: str, *argv: object, body: bytes | None = None, label: str = ""
    ) -> Fetched:
        """Post the request as EST wants it, with line breaks as `base64` makes them."""
        file = self.folder / "body"
        file.write_bytes(body or base64.encodebytes(self.csr.read_bytes()))
        return self.site.curl(
            f"/.well-known/est/{label}{operation}",
            *("-H", "Content-Type: application/pkcs10", "--data-binary", f"@{file}"),
            *argv,
        )

    def keep(self, got: Fetched) -> None:
        """Take the certificate out of the answer, by openssl."""
        assert got.status == 200, got
        assert "application/pkcs7-mime" in got.headers
        der = base64.b64decode(got.body, validate=True)
        told = openssl("pkcs7", "-inform", "DER", "-print_certs", give=der)
        (pem,) = PEM.findall(told)
        self.cert.write_text(pem)

    def enrolled(self, *argv: object, profile: str | None = None) -> OpensslDevice:
        """By token."""
        token = self.site.gateway.token_now(self.name, profile=profile)
        self.keep(self.ask("simpleenroll", "--user", f"{self.name}:{token}", *argv))
        return self


def told(printed: str) -> dict[str, Any] | None:
    """The answer of `whoami` in what s_client printed; None where there is none."""
    found = re.search(r'\{"device".*?\}', printed)
    return None if found is None else json.loads(found[0])


def by_psk(psk: dict[str, str], version: str, suites: str = PSK_SUITES) -> list[str]:
    """s_client's options for a PSK in that version."""
    options = [version, "-psk_identity", psk["identity"], "-psk", psk["key"]]
    if version == "-tls1_2":
        return [*options, "-cipher", suites]
    return [*options, "-ciphersuites", "TLS_AES_128_GCM_SHA256"]
