"""The agent's folder: who it is, whom it trusts, what it holds, what it last did."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from device_agent import files, keys
from device_agent.address import Endpoint, parse_endpoint
from device_agent.clock import Clock, system_time
from device_agent.schedule import RenewRule
from device_agent.sessions import Sessions
from device_agent.slots import Slots
from provisioning.model.errors import PeerError, Unusable
from provisioning.model.ids import DeviceId

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from pathlib import Path

LONGEST_DETAIL: Final = 500


@dataclass(frozen=True, slots=True)
class Belonging:
    """Which device this is and whose: what `gateway.json` holds.

    url: as it was typed. mode: "cert" or "psk", what enrolment was to give.
    mqtts: None when the gateway said it has none, or was not asked yet.
    """

    url: str
    device: DeviceId
    mode: str
    mqtts: str | None = None
    rule: RenewRule = field(default_factory=RenewRule)

    @property
    def gateway(self) -> Endpoint:
        """Where HTTPS is."""
        return parse_endpoint(self.url, "https")

    @property
    def broker(self) -> Endpoint | None:
        """Where MQTT is."""
        return parse_endpoint(self.mqtts, "mqtts") if self.mqtts else None

    def encode(self) -> bytes:
        """As the file holds it."""
        document = {
            "gateway": self.url,
            "device": self.device.text,
            "mode": self.mode,
            "mqtts": self.mqtts,
            "renew": {"at": self.rule.at, "jitter": self.rule.jitter},
        }
        return json.dumps(document, indent=1).encode()

    @classmethod
    def decode(cls, content: bytes) -> Belonging:
        """From the file. Raises ValueError for what was never written by us."""
        try:
            document = json.loads(content)
            mqtts = document["mqtts"]
            found = cls(
                str(document["gateway"]),
                DeviceId.parse(str(document["device"])),
                "psk" if document["mode"] == "psk" else "cert",
                None if mqtts is None else str(mqtts),
                RenewRule.within_reason(
                    document["renew"]["at"], document["renew"]["jitter"]
                ),
            )
            _ = found.gateway, found.broker
        except (KeyError, TypeError, RecursionError, PeerError) as error:
            raise ValueError("gateway.json has other fields") from error
        return found


@dataclass(frozen=True, slots=True)
class Last:
    """What the agent last did. outcome: "done", "refused", "later", "failed"."""

    at: str
    action: str
    outcome: str
    detail: str | None

    def as_json(self) -> dict[str, str | None]:
        """As `status --json` prints it."""
        return {
            "at": self.at,
            "action": self.action,
            "outcome": self.outcome,
            "detail": self.detail,
        }


class Home:
    """Everything under `--state`. Writes may raise OSError; damage is Unusable."""

    def __init__(
        self,
        folder: Path,
        disk: files.Disk | None = None,
        system: Callable[[], datetime] = system_time,
    ) -> None:
        self.folder = folder
        self.control_path = folder / "control"
        self.lock = files.Lock(folder / "lock")
        self._disk = disk or files.Disk()
        self._system = system
        self.slots = Slots(folder, self._disk)

    def open(self) -> None:
        """Make or check the folder. Raises Unusable."""
        files.private_folder(self.folder)
        self.slots.make()

    def check(self) -> bool:
        """Whether there is a folder at all; Unusable when it is not ours alone."""
        return files.check_folder(self.folder)

    def clock(self) -> Clock:
        """The clock with its floor."""
        clock = Clock(self.folder / "clock", self._disk, self._system)
        anchors = files.read_private(self.folder / "anchors.pem")
        if anchors is not None:
            try:
                clock.raise_to(keys.beginning_of(keys.pem_to_ders(anchors)))
            except ValueError as error:
                raise _damaged(self.folder / "anchors.pem", error) from error
        return clock

    def sessions(self) -> Sessions:
        """The kept TLS sessions."""
        return Sessions(self.folder / "session", self._disk)

    def belonging(self) -> Belonging | None:
        """What `gateway.json` says; None before the first enrolment."""
        path = self.folder / "gateway.json"
        content = files.read_private(path)
        if content is None:
            return None
        try:
            return Belonging.decode(content)
        except ValueError as error:
            raise _damaged(path, error) from error

    def belong(self, to: Belonging) -> None:
        """Write `gateway.json` if it says anything else."""
        path = self.folder / "gateway.json"
        if files.read_private(path) != to.encode():
            self._disk.write_atomically(path, to.encode())

    def learn(self, mqtts: str | None, rule: RenewRule) -> None:
        """Note what the gateway said of itself."""
        known = self.belonging()
        if known is not None:
            self.belong(replace(known, mqtts=mqtts, rule=rule))

    def anchors(self) -> bytes:
        """The trust anchors, PEM."""
        path = self.folder / "anchors.pem"
        content = files.read_private(path)
        if content is None:
            raise Unusable(str(path), "it is missing; enrol first")
        return content

    def trust(self, anchors_pem: bytes) -> None:
        """Replace the trust anchors."""
        self._disk.write_atomically(self.folder / "anchors.pem", anchors_pem)

    def note(self, last: Last) -> None:
        """Remember what was done, for `status`."""
        content = json.dumps(last.as_json()).encode()
        self._disk.write_atomically(self.folder / "last.json", content)

    def last(self) -> Last | None:
        """What was last done; None if nothing, or if the note is damaged."""
        content = files.read_private(self.folder / "last.json")
        if content is None:
            return None
        try:
            document = json.loads(content)
            detail = document["detail"]
            return Last(
                str(document["at"]),
                str(document["action"]),
                str(document["outcome"]),
                None if detail is None else str(detail)[:LONGEST_DETAIL],
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            return None


def _damaged(path: Path, error: Exception) -> Unusable:
    return Unusable(str(path), f"its content is damaged ({error})")
