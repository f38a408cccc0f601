"""Who a client may call itself, and where a device may publish and subscribe.

Pure. One branch a device: it publishes below `devices/ID/up/` and subscribes below
`devices/ID/down/`, nothing else. A will is a publication, judged at CONNECT. A
*response topic* (MQTT 5, 4.10) is where somebody else will publish for this device to
receive, so it must be below `devices/ID/down/`: were it free, a device could have a
service that answers requests write into the branch of another device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from provisioning.model.errors import PeerError
from provisioning.model.refusals import (
    AUTH_METHOD,
    CLIENT_ID_NOT_ALLOWED,
    PROTOCOL_ERROR,
    TOPIC_NOT_ALLOWED,
)
from provisioning.wire.mqtt import Prop, number_of, text_of

if TYPE_CHECKING:
    from provisioning.model.ids import DeviceId
    from provisioning.wire.mqtt import Connect, Publish

_NAME = re.compile(r"[A-Za-z0-9\-]{1,32}")
_SHARE = "$share/"


@dataclass(frozen=True, slots=True)
class Branch:
    """The two prefixes below which a device lives, with their last slash."""

    up: str
    down: str

    @classmethod
    def of(cls, device: DeviceId) -> Branch:
        """The branch of this device. Its ID has no slash and no wildcard in it."""
        return cls(f"devices/{device}/up/", f"devices/{device}/down/")


def client_id(asked: str, device: DeviceId) -> str:
    """The client identifier that the broker is told: as asked, or the device ID.

    Raises PeerError(client_id_not_allowed).
    """
    if asked in ("", device.text):
        return device.text
    owner, mark, name = asked.partition(":")
    if owner == device.text and mark and _NAME.fullmatch(name):
        return asked
    raise PeerError(CLIENT_ID_NOT_ALLOWED)


def may_publish(topic: str, branch: Branch) -> bool:
    """Whether the device may publish there: below its `up`, no wildcard."""
    return topic.startswith(branch.up) and len(topic) > len(branch.up) and _plain(topic)


def may_be_answered(topic: str, branch: Branch) -> bool:
    """Whether a response topic is allowed: below the device's `down`, no wildcard."""
    return (
        topic.startswith(branch.down)
        and len(topic) > len(branch.down)
        and _plain(topic)
    )


def may_subscribe(topic_filter: str, branch: Branch) -> bool:
    """Whether the device may subscribe so: wildcards only below its own `down`.

    `$share/GROUP/FILTER` is judged by FILTER. Everything that begins otherwise is
    outside of the branch, `$SYS` and other brokers' own prefixes with it.
    """
    if topic_filter.startswith(_SHARE):
        group, _, topic_filter = topic_filter[len(_SHARE) :].partition("/")
        if not group or "+" in group or "#" in group:
            return False
    if not topic_filter.startswith(branch.down):
        return False
    below = topic_filter[len(branch.down) :]
    return bool(below) and _well_formed(below)


def _well_formed(below: str) -> bool:
    """Wildcards stand alone in their level, `#` in the last one (4.7.1)."""
    *levels, last = below.split("/")
    return all(level == "+" or _plain(level) for level in levels) and (
        last in {"+", "#"} or _plain(last)
    )


def _plain(level: str) -> bool:
    return "+" not in level and "#" not in level


def judge_connect(connect: Connect, device: DeviceId, branch: Branch) -> str:
    """The client identifier under which the device may connect.

    Raises PeerError(client_id_not_allowed | topic_not_allowed | auth_method): the
    last since a broker that knows MQTT's own authentication could be told another
    name by it.
    """
    chosen = client_id(connect.client_id, device)
    if text_of(connect.properties, Prop.AUTH_METHOD) is not None:
        raise PeerError(AUTH_METHOD)
    will = connect.will
    if will is not None:
        if not may_publish(will.topic, branch):
            raise PeerError(TOPIC_NOT_ALLOWED)
        response = text_of(will.properties, Prop.RESPONSE_TOPIC)
        if response is not None and not may_be_answered(response, branch):
            raise PeerError(TOPIC_NOT_ALLOWED)
    return chosen


class Aliases:
    """The topic aliases that a client has set on one connection (MQTT 5, 3.3.2.3.4).

    limit: the highest alias it was allowed, and so how many there can be.
    """

    __slots__ = ("_limit", "_topics")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._topics: dict[int, str] | None = None

    def resolve(self, publish: Publish) -> str:
        """The topic that a PUBLISH means; sets the alias that it brings.

        Raises PeerError(protocol_error) for aliases never set or above the limit.
        """
        alias = number_of(publish.properties, Prop.TOPIC_ALIAS)
        if alias is None:
            return publish.topic
        if alias > self._limit:
            raise PeerError(PROTOCOL_ERROR)
        if self._topics is None:
            self._topics = {}
        if publish.topic:
            self._topics[alias] = publish.topic
            return publish.topic
        topic = self._topics.get(alias)
        if topic is None:
            raise PeerError(PROTOCOL_ERROR)
        return topic

    def spoil(self, publish: Publish) -> None:
        """Have the alias that this refused PUBLISH brought mean nothing allowed.

        The client believes it set. The broker never hears of it, and may know it by
        an earlier topic, which a later use must not reach.
        """
        alias = number_of(publish.properties, Prop.TOPIC_ALIAS)
        if alias is not None and publish.topic and self._topics is not None:
            self._topics[alias] = ""


def judge_publish(publish: Publish, branch: Branch, aliases: Aliases) -> None:
    """Raise PeerError(topic_not_allowed) unless the device may publish this.

    Raises PeerError(protocol_error) where an alias is not one; that ends the
    connection, while the other only ends the message.
    """
    allowed = may_publish(aliases.resolve(publish), branch)
    if allowed and publish.properties:
        response = text_of(publish.properties, Prop.RESPONSE_TOPIC)
        allowed = response is None or may_be_answered(response, branch)
    if not allowed:
        aliases.spoil(publish)
        raise PeerError(TOPIC_NOT_ALLOWED)
