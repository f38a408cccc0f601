"""The agent stays light: what it imports, and what it weighs."""

from __future__ import annotations

import json
import subprocess
import sys

PROBE = """
import json, sys
import device_agent.cli, device_agent.run, device_agent.enrol, device_agent.wishes
import device_agent.status
# Not getrusage: its peak is inherited from whoever forked us.
status = open("/proc/self/status").read()
peak_kib = int(status.split("VmHWM:")[1].split()[0])
print(json.dumps({"modules": sorted(sys.modules), "peak_kib": peak_kib}))
"""
HEAVY = {"aiohttp", "sqlalchemy", "alembic", "pkcs11", "jinja2", "typer", "rich"}
SERVER = {"registry", "hsm", "ca", "psk", "enrol", "config"}


def imported():
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, check=True, text=True
    )
    return json.loads(done.stdout)


def test_the_agent_imports_no_server_and_weighs_little():
    told = imported()
    names = {name.partition(".")[0] for name in told["modules"]}
    assert not names & HEAVY
    ours = {name for name in told["modules"] if name.startswith("provisioning.")}
    assert not {name.split(".")[1] for name in ours} & SERVER
    # The bound is for runaway imports; script/bench measures the real figure.
    assert told["peak_kib"] < 48 * 1024, f"{told['peak_kib']} KiB"
