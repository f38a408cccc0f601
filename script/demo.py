"""The main job, narrated: three ways in, rotation, resumption, revocation.

Everything is real: a SoftHSM token, a CA in it, the gateway with its mosquitto, and
agents as a device would run them. A step that does not happen ends the demo with 1.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    pkcs7,
)
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable

BIN = Path(sys.executable).parent
STEP_S = 60.0
NO_END_YEAR = 9999
out = Console(highlight=False, soft_wrap=True)


class StepError(Exception):
    """A step that was narrated did not happen."""


class Demo:
    """One data directory, one gateway, and the agents of four devices."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        (folder / "devices").mkdir()
        self.gateway: subprocess.Popen[str] | None = None
        self.agents: list[subprocess.Popen[bytes]] = []
        self.ready: dict[str, Any] = {}
        self.log = folder / "gateway.log"

    # Commands
    def birthmark(self, *arguments: str) -> dict[str, Any]:
        """`birthmark ARGUMENTS --json`, parsed."""
        done = self._run(BIN / "birthmark", "--data", self.data, *arguments, "--json")
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    def agent(self, device: str, *arguments: str, code: int = 0) -> str:
        """`birthmark-agent ARGUMENTS` of one device; its output, both streams."""
        done = subprocess.run(  # noqa: S603 - our own command
            [str(BIN / "birthmark-agent"), "--state", self.state(device), *arguments],
            capture_output=True,
            text=True,
            timeout=STEP_S,
            check=False,
        )
        if done.returncode != code:
            raise StepError(
                f"birthmark-agent {' '.join(arguments)} ended with "
                f"{done.returncode}, not {code}: {done.stderr.strip()}"
            )
        return done.stdout + done.stderr

    def status(self, device: str) -> dict[str, Any]:
        """What the agent of a device holds."""
        document: dict[str, Any] = json.loads(self.agent(device, "status", "--json"))
        return document

    def state(self, device: str) -> str:
        """The agent's state directory."""
        return str(self.folder / "devices" / device)

    def secret(self, name: str, content: str) -> str:
        """A file that only its owner reads."""
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_text(content)
        return str(path)

    def _run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(  # noqa: S603 - our own commands
            [str(one) for one in arguments],
            capture_output=True,
            text=True,
            timeout=STEP_S,
            check=False,
        )
        if done.returncode:
            raise StepError(f"{arguments[0]}: {done.stderr.strip()}")
        return done

    # The stage
    def start(self) -> None:
        """Initialise, serve, and wait for the line that says so."""
        say("A SoftHSM token, a root, a factory and an issuing CA in it")
        made = self.birthmark(
            "init", "--org", "Demo Works", "--domain", "demo.test", "--host",
            "localhost", "--ephemeral-ports",
        )  # fmt: skip
        tell(f"root SHA-256 {made['sha256']}")
        self.pin = str(made["sha256"])
        say("The gateway, with a mosquitto that only it can reach")
        self.gateway = subprocess.Popen(  # noqa: S603 - our own command
            [str(BIN / "birthmark"), "--data", str(self.data), "gateway"],
            stdout=subprocess.PIPE,
            stderr=self.log.open("ab"),
            text=True,
        )
        lines: list[str] = []
        heard = threading.Event()

        def listen(gateway: subprocess.Popen[str]) -> None:
            for line in gateway.stdout or ():
                lines.append(line)
                heard.set()
            heard.set()

        threading.Thread(target=listen, args=(self.gateway,), daemon=True).start()
        if not heard.wait(STEP_S) or not lines:
            raise StepError(f"the gateway did not start:\n{self.log.read_text()}")
        self.ready = json.loads(lines[0])
        self.url = f"https://localhost:{self.ready['https']}"
        tell(f"devices: {self.url}, mqtts://localhost:{self.ready['mqtts']}")
        tell(f"OCSP and CRL: http://localhost:{self.ready['http']}")

    def stop(self) -> None:
        """End what was started, agents first."""
        for agent in self.agents:
            end(agent)
        if self.gateway is not None and end(self.gateway) != 0:
            raise StepError(f"the gateway ended with {self.gateway.returncode}")

    # The job
    def by_token(self) -> None:
        """pump-1: an enrolment token, the root pinned by its hash."""
        say("pump-1 enrols by token, trusting the root by its SHA-256")
        token = self.birthmark("token", "create", "--device", "pump-1")["token"]
        self.agent(
            "pump-1", "enroll", "--gateway", self.url, "--device-id", "pump-1",
            "--token-file", self.secret("pump-1.token", token),
            "--ca-sha256", self.pin,
        )  # fmt: skip
        held = self.status("pump-1")
        expect(bool(held["serial"]), "pump-1 holds a certificate")
        tell(f"certificate {held['serial']} until {held['not_after']}")

    def by_factory_certificate(self) -> None:
        """valve-2: an IDevID from the factory, then an LDevID by it."""
        say("valve-2 gets its factory identity, which has no end date")
        token = self.birthmark(
            "token", "create", "--device", "valve-2", "--profile", "idevid"
        )["token"]
        key, certificate = self.factory_identity("valve-2", token)
        say("valve-2 enrols in the field by its factory certificate")
        self.agent(
            "valve-2", "enroll", "--gateway", self.url, "--cert", certificate,
            "--key", key, "--ca-sha256", self.pin,
        )  # fmt: skip
        held = self.status("valve-2")
        kinds = [c["profile"] for c in self.show("valve-2")["credentials"]]
        expect(kinds == ["idevid", "ldevid"], "valve-2 has both identities")
        tell(f"certificate {held['serial']} until {held['not_after']}")

    def factory_identity(self, device: str, token: str) -> tuple[str, str]:
        """What a factory station does: key, CSR, EST under the profile's label."""
        key = ec.generate_private_key(ec.SECP256R1())
        request = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([]))
            .sign(key, hashes.SHA256())
        )
        anchors = self.secret("root.pem", self._run(
            BIN / "birthmark", "--data", self.data, "ca", "export"
        ).stdout)  # fmt: skip
        connection = http.client.HTTPSConnection(
            "localhost",
            self.ready["https"],
            context=ssl.create_default_context(cafile=anchors),
            timeout=STEP_S,
        )
        connection.request(
            "POST",
            "/.well-known/est/idevid/simpleenroll",
            base64.b64encode(request.public_bytes(Encoding.DER)),
            {
                "Content-Type": "application/pkcs10",
                "Authorization": "Basic "
                + base64.b64encode(f"{device}:{token}".encode()).decode(),
            },
        )
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        expect(answer.status == HTTPStatus.OK, f"the factory CA answers: {body!r}")
        [leaf] = pkcs7.load_der_pkcs7_certificates(base64.b64decode(body))
        expect(leaf.not_valid_after_utc.year == NO_END_YEAR, "it has no end date")
        pem = key.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        ).decode()
        chain = leaf.public_bytes(Encoding.PEM).decode()
        return self.secret(f"{device}.key", pem), self.secret(f"{device}.crt", chain)

    def by_psk(self) -> None:
        """meter-3: a pre-shared key that the HSM derives and nobody stores."""
        say("meter-3 enrols by PSK and stays with it")
        made = self.birthmark("psk", "create", "meter-3")
        self.agent(
            "meter-3", "enroll", "--gateway", self.url,
            "--psk-file", self.secret("meter-3.psk", json.dumps(made)),
            "--ca-sha256", self.pin,
        )  # fmt: skip
        held = self.status("meter-3")
        expect(held["mode"] == "psk", "meter-3 holds a PSK")
        tell(f"identity {held['identity']}")

    def rotate(self) -> None:
        """Both kinds of credential rotate; the old ones end when the new are proven."""
        for device in ("pump-1", "meter-3"):
            say(f"{device} rotates")
            before = self.status(device)
            self.agent(device, "rotate")
            after = self.status(device)
            name = "serial" if after["mode"] == "cert" else "identity"
            expect(before[name] != after[name], f"{device} has a new credential")
            states = [c["state"] for c in self.show(device)["credentials"]]
            expect("superseded" in states, f"{device}'s old credential has ended")
            tell(f"{before[name]} → {after[name]}; {', '.join(states)}")

    def run_and_obey(self) -> None:
        """pump-1 stays connected; the operator asks for a rotation by MQTT."""
        say("pump-1 runs, and its operator asks for a rotation over MQTT")
        agent = self.run_agent("pump-1")
        until(lambda: bool(self.seen("pump-1")), "pump-1 is connected")
        before = self.status("pump-1")["serial"]
        self.birthmark("devices", "rotate", "pump-1")
        until(lambda: self.status("pump-1")["serial"] != before, "pump-1 has rotated")
        tell(f"{before} → {self.status('pump-1')['serial']}")
        say("pump-1 comes back by its TLS session: no certificate on the wire")
        expect(end(agent) == 0, "the agent ends cleanly")
        self.agents.remove(agent)
        mark = time.time()
        self.run_agent("pump-1")
        until(
            lambda: (
                self.seen("pump-1").get("resumed") is True
                and stamp(self.seen("pump-1")["at"]) >= mark - 2
            ),
            "pump-1 has resumed",
        )
        tell(f"last seen {self.seen('pump-1')}")

    def revoke(self) -> None:
        """The operator revokes; live connections are cut, and the device told why."""
        for device in ("pump-1", "meter-3"):
            say(f"{device} is revoked")
            begun = time.monotonic()
            done = self.birthmark(
                "devices", "revoke", device, "--reason", "keyCompromise"
            )
            expect(done["not_applied"] == [], "every gateway has applied it")
            cut = any(
                event["event"] == "cut" and event["device"] == device
                for event in map(json.loads, self.log.read_text().splitlines())
            )
            expect(cut == (device == "pump-1"), "the one that was connected is cut")
            tell("its live connection is cut" if cut else "it was not connected")
            tell(
                f"revoked {', '.join(done['revoked'])} in "
                f"{time.monotonic() - begun:.1f} s, command included"
            )
        said = self.agent("meter-3", "rotate", code=3)
        tell(f"meter-3 is told: {said.strip().splitlines()[-1]}")
        expect("revoked" in said, "the refusal says why")

    # Small things
    def run_agent(self, device: str) -> subprocess.Popen[bytes]:
        """`birthmark-agent run`, until it is ended."""
        log = (self.folder / f"{device}.log").open("ab")
        agent = subprocess.Popen(  # noqa: S603 - our own command
            [str(BIN / "birthmark-agent"), "--state", self.state(device), "run"],
            stdout=log,
            stderr=log,
        )
        self.agents.append(agent)
        return agent

    def show(self, device: str) -> dict[str, Any]:
        """`devices show`."""
        return self.birthmark("devices", "show", device)

    def seen(self, device: str) -> dict[str, Any]:
        """When and how a device was last seen; empty if never."""
        return self.show(device)["last_seen"] or {}


def stamp(text: str) -> float:
    """Seconds since 1970 of an RFC 3339 time."""
    return datetime.fromisoformat(text).timestamp()


def say(what: str) -> None:
    """A step begins."""
    out.print(f"[bold]▸ {what}[/bold]")


def tell(what: str) -> None:
    """What came of it."""
    out.print(f"  {what}", markup=False)


def expect(happened: bool, what: str) -> None:
    """What the narration claims, or the end of it."""
    if not happened:
        raise StepError(f"not so: {what}")


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that other processes bring about."""
    end_at = time.monotonic() + STEP_S / 2
    while not condition():
        if time.monotonic() > end_at:
            raise StepError(f"not so in time: {what}")
        threading.Event().wait(0.2)


def end(process: subprocess.Popen[Any]) -> int:
    """SIGTERM, and its exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def main() -> int:
    """Run the demo; 0 when everything that was narrated happened."""
    parser = argparse.ArgumentParser(description=__doc__, prog="script/demo")
    parser.add_argument("--once", action="store_true", help="end when it is done")
    once = parser.parse_args().once
    folder = Path(tempfile.mkdtemp(prefix="birthmark-demo-"))
    demo = Demo(folder)
    code = 1
    # Ended by SIGTERM, it ends what it started as well.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        demo.start()
        demo.by_token()
        demo.by_factory_certificate()
        demo.by_psk()
        demo.rotate()
        demo.run_and_obey()
        demo.revoke()
        say("All of it happened")
        code = 0
        if not once:
            stay(demo)
    except StepError as error:
        out.print(f"[bold red]✗[/bold red] {error}")
        code = 1
    except KeyboardInterrupt:
        out.print()
    finally:
        try:
            demo.stop()
        except StepError as error:
            out.print(f"[bold red]✗[/bold red] {error}")
            code = 1
        if code == 0:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            out.print(f"What is left of it: {folder}")
    return code


def stay(demo: Demo) -> None:
    """Leave everything running for a person to try things."""
    out.print()
    tell(f"The gateway stays up. Try: {BIN}/birthmark --data {demo.data} devices list")
    tell("Ctrl-C ends it.")
    if demo.gateway is not None:
        demo.gateway.wait()
        raise StepError("the gateway ended by itself")


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main())
