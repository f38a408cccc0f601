"""MQTT by mosquitto's own clients, in both versions, by certificate and by PSK."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from gateway_process import until
from programs import program, run

VERSIONS = pytest.mark.parametrize("version", ["mqttv311", "mqttv5"])
FOLLOWED = ("-d", "-q", "1", "-W", "15")
MODES = pytest.mark.parametrize("mode", ["certificate", "psk"])


@pytest.fixture(scope="module")
def pump(site):
    device = site.device("mqtt-pump").enrolled()
    device.psk = site.psk(device)
    return device


def proof(site, device, mode):
    """How mosquitto's clients prove a device."""
    address = ("-h", "localhost", "-p", site.gateway.ready["mqtts"])
    if mode == "psk":
        psk = device.psk
        return (*address, "--psk", psk["key"], "--psk-identity", psk["identity"])
    return (*address, "--cafile", site.root, *device.mtls)


def publish(*argv, code=0):
    return run("mosquitto_pub", *argv, "-m", "21.5", "-q", "1", code=code).decode()


class Subscriber:
    """A mosquitto_sub that is heard while it runs."""

    def __init__(self, *argv):
        self._process = subprocess.Popen(
            # Line by line: into a pipe it would keep what it says until its end.
            ["stdbuf", "-oL", program("mosquitto_sub"), *map(str, argv), *FOLLOWED],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
        )
        self.heard = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def hear(self, words):
        """Read on until these words have come; False when it ends without them."""
        while words not in self.heard:
            line = self._process.stdout.readline()
            if not line:
                return False
            self.heard += line
        return True


@MODES
@VERSIONS
def test_a_device_publishes_into_its_branch(site, pump, mode, version):
    publish(*proof(site, pump, mode), "-V", version, "-t", "devices/mqtt-pump/up/t")


@MODES
def test_a_device_may_not_publish_elsewhere(site, pump, mode):
    for topic in ("devices/other/up/t", "devices/mqtt-pump/down/t", "$SYS/x"):
        argv = (*proof(site, pump, mode), "-V", "mqttv5", "-t", topic, "-d")
        said = publish(*argv, code=None)
        # MQTT 5 refuses the one message: reason 135, not authorized.
        assert "RC:135" in said or "135" in said or "ot authorized" in said, said


@MODES
@VERSIONS
def test_an_order_to_rotate_reaches_a_subscriber(site, mode, version):
    name = f"order-{mode}-{version}"
    device = site.device(name).enrolled()
    device.psk = site.psk(device)
    topic = f"devices/{name}/down/#"
    argv = (*proof(site, device, mode), "-V", version, "-t", topic)
    with Subscriber(*argv) as subscriber:
        assert subscriber.hear("Subscribed"), subscriber.heard
        done = site.rotate(name)
        assert subscriber.hear('"rotate"'), subscriber.heard
    (line,) = [one for one in subscriber.heard.splitlines() if one.startswith("{")]
    order = json.loads(line)
    assert order == {"action": "rotate", "by": order["by"], "campaign": None}
    assert order["by"][:16] == done["by"][:16]


@VERSIONS
@MODES
def test_a_subscriber_of_others_hears_nothing(site, pump, mode, version):
    argv = (*proof(site, pump, mode), "-V", version, "-t", "devices/+/down/#")
    with Subscriber(*argv) as subscriber:
        code = "128" if version == "mqttv311" else "135"
        assert subscriber.hear(code), subscriber.heard


@MODES
@VERSIONS
def test_revocation_cuts_a_subscriber_and_its_return_is_refused(site, mode, version):
    name = f"cut-{mode}-{version}"
    device = site.device(name).enrolled()
    device.psk = site.psk(device)
    argv = (*proof(site, device, mode), "-V", version)
    topic = ("-t", f"devices/{name}/down/#")
    with Subscriber(*argv, *topic) as subscriber:
        assert subscriber.hear("Subscribed"), subscriber.heard
        done = site.revoke(name)
        assert done["not_applied"] == []
        # MQTT 5 is told: administrative action. In 3.1.1 it is cut; then it comes
        # back by itself, as devices do, and hears why not.
        last = "DISCONNECT (152)" if version == "mqttv5" else "ot authori"
        assert subscriber.hear(last), subscriber.heard
    said = publish(*argv, "-t", f"devices/{name}/up/t", code=None)
    assert "ot authori" in said, said


@VERSIONS
def test_nobody_without_a_credential(site, version):
    address = ("-h", "localhost", "-p", site.gateway.ready["mqtts"])
    argv = (*address, "--cafile", site.root, "-V", version, "-t", "devices/x/up/t")
    said = publish(*argv, code=None)
    assert "ot authori" in said, said
    said = publish(*argv, "-u", "mqtt-pump", "-P", "x", code=None)
    assert "ot authori" in said, said


def test_the_broker_is_not_reachable_around_the_gateway(site):
    """Its socket is below a folder that only the owner may enter."""
    run_folder = site.gateway.data / "run"
    assert run_folder.stat().st_mode & 0o077 == 0
    pid = site.gateway.said("broker_started")[-1]["pid"]
    listening = until(
        lambda: [
            line.split()
            for table in ("tcp", "tcp6")
            for line in _lines(f"/proc/{pid}/net/{table}")
            if line.split()[3] == "0A"
        ]
    )
    owned = {
        link.readlink().name
        for link in _links(f"/proc/{pid}/fd")
        if link.readlink().name.startswith("socket:")
    }
    inodes = {f"socket:[{row[9]}]" for row in listening}
    assert not owned & inodes


def _lines(path):
    with open(path, encoding="ascii") as file:  # noqa: PTH123 - the kernel's file
        return file.read().splitlines()[1:]


def _links(path):
    return [one for one in Path(path).iterdir() if one.is_symlink()]
