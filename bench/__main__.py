"""script/bench [--json] [--quick] [NAME ...]: measure, and print what came of it."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench import agent, connect, enrol, mqtt, ocsp, signing, wire
from bench.house import House
from bench.machine import BenchError, prepare_this_process
from bench.results import document, print_table
from bench.rounds import QUICK, Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.results import Result

    Measure = Callable[[House, Path, Plan, str], Result | list[Result]]

MEASURES: dict[str, Measure] = {
    "enrol.fresh": enrol.measure,
    "enrol.kept": enrol.measure,
    "connect.mtls13": connect.measure,
    "connect.resumed13": connect.measure,
    "connect.psk13": connect.measure,
    "connect.psk12": connect.measure,
    "mqtt.connect": mqtt.connect,
    "mqtt.publish": mqtt.publish,
    "idle.mqtt": mqtt.idle,
    "agent.rss": agent.measure,
    "agent.private": agent.measure,
    "agent.first_connect": agent.measure,
    "sign.certificate": signing.certificate,
    "ocsp": ocsp.measure,
    "crl.100k": signing.crl_100k,
    "wire.mtls13": wire.measure,
    "wire.resumed13": wire.measure,
    "wire.psk13": wire.measure,
    "wire.psk12": wire.measure,
}
NO_GATEWAY = {"sign.certificate", "crl.100k"}


def main() -> int:
    """0 when everything asked for was measured."""
    asked = _arguments()
    prepare_this_process()
    if asked.profile:
        from bench import profile  # noqa: PLC0415 - not part of a usual run

        profile.run(asked.profile, sys.stdout, quick=asked.quick)
        return 0
    results, failed = measure(
        asked.names or list(MEASURES), QUICK if asked.quick else Plan()
    )
    if asked.json:
        print(document(results))
    else:
        print_table(results, sys.stdout)
    return 1 if failed else 0


def measure(names: list[str], plan: Plan) -> tuple[list[Result], bool]:
    """Every one of these; whether one failed, which is told on standard error."""
    results: dict[str, Result] = {}
    failed = False
    with tempfile.TemporaryDirectory(prefix="birthmark-bench-") as place:
        root = Path(place)
        house: House | None = None
        try:
            for name in names:
                if name in results:
                    continue
                begun = time.monotonic()
                try:
                    if house is None and name not in NO_GATEWAY:
                        house = _new_house(root)
                    folder = Path(tempfile.mkdtemp(dir=root))
                    found = MEASURES[name](house, folder, plan, name)  # type: ignore[arg-type] # those of NO_GATEWAY take none
                except (BenchError, OSError) as error:
                    failed = True
                    _say(f"{name}: {error}")
                    if house is not None:
                        _say(f"the gateway's log ends: {house.process.last_words()}")
                    continue
                found = found if isinstance(found, list) else [found]
                results.update({one.name: one for one in found})
                _say(f"{name} took {time.monotonic() - begun:.1f} s")
        finally:
            if house is not None:
                house.process.stop()
    return [results[name] for name in names if name in results], failed


def _new_house(root: Path) -> House:
    folder = root / "gateway"
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
    folder.mkdir()
    return House(folder)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="script/bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MEASURES))
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="a smoke run: no figures")
    parser.add_argument(
        "--profile",
        choices=("enrol", "connect", "mqtt"),
        help="where the time of it goes, part by part",
    )
    asked = parser.parse_args()
    unknown = [name for name in asked.names if name not in MEASURES]
    if unknown:
        parser.error(f"unknown or not built yet: {', '.join(unknown)}")
    return asked


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
