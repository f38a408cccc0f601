"""Reads birthmark.toml: checked once, with the line of what is wrong in it."""

from __future__ import annotations

import ipaddress
import os
import re
import stat
import tomllib
from dataclasses import MISSING, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from provisioning.config.sections import (
    EVERYWHERE,
    PORTS,
    Broker,
    Config,
    Hsm,
    Limits,
    Listener,
    Listeners,
    Outages,
    Psk,
    Revocation,
    Rotation,
)
from provisioning.model.errors import ConfigError, PeerError, Unusable
from provisioning.model.ids import TrustDomain
from provisioning.tls.policy import POLICIES
from provisioning.x509.profiles import DEFAULTS, Profile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from provisioning.x509.csr import KeyRules

FILE = "birthmark.toml"


def load(folder: Path | str) -> Config:
    """Read FOLDER/birthmark.toml and check it, and that nobody else may read it.

    Raises ConfigError with file and line for what is wrong in it, Unusable for a
    folder that does not exist or that others may read.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise Unusable(
            "the data directory", f"{folder} does not exist; run `birthmark init`"
        )
    check_modes(folder)
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            FILE, f"not found in {folder}; run `birthmark init`"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(FILE, "it is not UTF-8") from None
    return parse(text, folder)


def check_modes(folder: Path) -> None:
    """Nothing but the owner may read the data folder, `public/` aside.

    Raises Unusable, with the command that mends it.
    """
    # Others may pass through the folder itself, towards public/, but not list it.
    _check_mode(folder, 0o066)
    for place, folders, files in os.walk(folder):
        if Path(place) == folder and "public" in folders:
            folders.remove("public")
        for name in (*folders, *files):
            _check_mode(Path(place) / name, 0o077)


def _check_mode(path: Path, forbidden: int) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:  # SQLite's journal or a socket, gone in the meantime
        return
    if stat.S_ISSOCK(found.st_mode):
        # mosquitto makes its socket 0770; the folder around it is the owner's alone.
        return
    if not stat.S_ISLNK(found.st_mode) and found.st_mode & forbidden:
        raise Unusable(
            str(path),
            f"others than its owner may read it (mode {found.st_mode & 0o777:04o}); "
            f"run `chmod go-rwx {path}`, and replace what was secret in it",
        )


def parse(text: str, folder: Path) -> Config:
    """The configuration in this text; raises ConfigError with file and line."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"line (\d+)", str(error))
        # Without a number it says "at end of document".
        line = int(found[1]) if found else len(text.splitlines()) or 1
        where = f"{FILE}:{line}"
        raise ConfigError(where, f"not TOML: {error}") from None
    return _Reader(text, document).config(folder)


class _Reader:
    """A parsed document beside its text, so that an error can name the line."""

    def __init__(self, text: str, document: Mapping[str, object]) -> None:
        self._lines = text.splitlines()
        self._document = document

    def config(self, folder: Path) -> Config:
        self._known(
            (),
            self._document,
            "fleet listen hsm registry broker limits rotation outages psk revocation "
            "tls profiles",
        )
        fleet = self._table("fleet")
        self._known(("fleet",), fleet, "org domain hosts")
        hosts = self._texts(("fleet", "hosts"), fleet.get("hosts", ("localhost",)))
        if not hosts:
            raise self.wrong(("fleet", "hosts"), "at least one host name is needed")
        for host in hosts:
            self._host(("fleet", "hosts"), host)
        registry = self._table("registry")
        self._known(("registry",), registry, "url")
        tls = self._table("tls")
        self._known(("tls",), tls, "policy")
        config = Config(
            folder=folder,
            org=self._organisation(fleet.get("org", "Birthmark")),
            domain=self._domain(fleet.get("domain", "birthmark.local")),
            hosts=hosts,
            hsm=self._section("hsm", Hsm),
            listen=self._listeners(),
            registry_url=self._text(
                ("registry", "url"),
                registry.get(
                    "url", f"sqlite+aiosqlite:///{folder / 'registry.sqlite3'}"
                ),
            ),
            broker=self._section("broker", Broker),
            limits=self._section("limits", Limits),
            rotation=self._section("rotation", Rotation),
            outages=self._section("outages", Outages),
            psk=self._section("psk", Psk),
            revocation=self._section("revocation", Revocation),
            tls_policy=self._one_of(
                ("tls", "policy"), tls.get("policy", "modern"), " ".join(POLICIES)
            ),
            profiles=self._profiles(),
        )
        http = config.listen.http
        if http is not None and http.port == 0 and http.public is None:
            raise self.wrong(
                ("listen", "http", "port"),
                "certificates name this port: give a fixed one, or `public`",
            )
        return config

    # Finding the place ----------------------------------------------------------

    def wrong(self, path: tuple[str, ...], why: str) -> ConfigError:
        """The error, with the line of the key, or of the table it would stand in."""
        line = self._line(path)
        where = FILE if line is None else f"{FILE}:{line}"
        return ConfigError(where, f"{'.'.join(path)}: {why}" if path else why)

    def _line(self, path: tuple[str, ...]) -> int | None:
        table: tuple[str, ...] = ()
        best = None
        for number, line in enumerate(self._lines, 1):
            if header := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
                table = tuple(p.strip(" \"'") for p in header[1].split("."))
                if path[: len(table)] == table:
                    best = number
            elif key := re.match(r"\s*([\w\-.\"']+)\s*=", line):
                names = tuple(p.strip("\"'") for p in key[1].split("."))
                if path[: len(table) + len(names)] == (*table, *names):
                    return number
        return best

    # Reading values -------------------------------------------------------------

    def _known(
        self, path: tuple[str, ...], table: Mapping[str, object], names: str
    ) -> None:
        for key in table:
            if key not in names.split():
                raise self.wrong(
                    (*path, key), f"unknown; known here: {', '.join(names.split())}"
                )

    def _table(self, *path: str) -> Mapping[str, object]:
        found: object = self._document
        for name in path:
            found = cast("Mapping[str, object]", found).get(name, {})
            if not isinstance(found, dict):
                raise self.wrong(path, "a table is wanted here")
        return cast("Mapping[str, object]", found)

    def _text(self, path: tuple[str, ...], value: object) -> str:
        if not isinstance(value, str) or not value:
            raise self.wrong(path, "a text in quotes is wanted")
        return value

    def _texts(self, path: tuple[str, ...], value: object) -> tuple[str, ...]:
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(self._text(path, one) for one in values)

    def _number(self, path: tuple[str, ...], value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.wrong(path, "a whole number is wanted, not negative")
        return value

    def _fraction(self, path: tuple[str, ...], value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(path, "a fraction between 0 and 1 is wanted")
        if not 0 <= value <= 1:
            raise self.wrong(path, "a fraction between 0 and 1 is wanted")
        return float(value)

    def _truth(self, path: tuple[str, ...], value: object) -> bool:
        if not isinstance(value, bool):
            raise self.wrong(path, "true or false is wanted")
        return value

    def _duration(self, path: tuple[str, ...], value: object) -> timedelta:
        found = duration(value) if isinstance(value, str) else None
        if found is None:
            raise self.wrong(path, 'a duration such as "30d", "1h", "90s" is wanted')
        return found

    def _host(self, path: tuple[str, ...], host: str) -> None:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            if _HOST.fullmatch(host) is None:
                raise self.wrong(
                    path, f"{host!r} is neither a host name nor an IP address"
                ) from None

    def _organisation(self, value: object) -> str:
        path = ("fleet", "org")
        text = self._text(path, value)
        if len(text.encode()) > _MAX_NAME or not text.isprintable():
            raise self.wrong(path, f"1 to {_MAX_NAME} printable octets are wanted")
        return text

    def _domain(self, value: object) -> TrustDomain:
        path = ("fleet", "domain")
        try:
            return TrustDomain.parse(self._text(path, value))
        except PeerError as error:
            raise self.wrong(path, error.detail) from None

    def _section(self, name: str, kind: type[_Section]) -> _Section:
        """A table whose keys are the fields of a dataclass; absent ones default."""
        table = self._table(name)
        self._known((name,), table, " ".join(f.name for f in fields(kind)))
        values: dict[str, object] = {}
        for field in fields(kind):
            path = (name, field.name)
            if field.name in table:
                value = table[field.name]
                values[field.name] = self._value(str(field.type), path, value)
            elif field.default is MISSING:
                raise self.wrong(path, "missing; nothing works without it")
        # Each value was read above by the type of its field.
        return cast("Callable[..., _Section]", kind)(**values)

    def _value(self, kind: str, path: tuple[str, ...], value: object) -> object:
        match kind:
            case "int":
                return self._number(path, value)
            case "bool":
                return self._truth(path, value)
            case "timedelta":
                return self._duration(path, value)
            case _:
                return self._text(path, value)

    # Listeners ------------------------------------------------------------------

    def _listeners(self) -> Listeners:
        table = self._table("listen")
        self._known(("listen",), table, " ".join(PORTS))
        found: dict[str, Listener | None] = {}
        for name in table:
            found[name] = self._listener(name)
        return replace(Listeners(), **found)

    def _listener(self, name: str) -> Listener | None:
        table = self._table("listen", name)
        path = ("listen", name)
        self._known(path, table, "enabled hosts port public plain_psk")
        if not self._truth((*path, "enabled"), table.get("enabled", True)):
            return None
        port = self._number((*path, "port"), table.get("port", PORTS[name]))
        if port > _MAX_PORT:
            raise self.wrong((*path, "port"), "a port is 0 to 65535")
        hosts = self._texts((*path, "hosts"), table.get("hosts", EVERYWHERE))
        for host in hosts:
            self._host((*path, "hosts"), host)
        public = table.get("public")
        if public is not None:
            public = self._text((*path, "public"), public)
            address, _, number = public.rpartition(":")
            if not number.isascii() or not number.isdigit() or not address:
                raise self.wrong((*path, "public"), '"HOST:PORT" is wanted')
            self._host((*path, "public"), address.strip("[]"))
        return Listener(
            port=port,
            hosts=hosts,
            public=public,
            plain_psk=self._truth((*path, "plain_psk"), table.get("plain_psk", False)),
        )

    # Profiles -------------------------------------------------------------------

    def _profiles(self) -> Mapping[str, Profile]:
        profiles = dict(DEFAULTS)
        for name in self._table("profiles"):
            if _PROFILE.fullmatch(name) is None:
                raise self.wrong(
                    ("profiles", name), "a profile is named a-z, 0-9, '-'; 1 to 32"
                )
            profiles[name] = self._profile(name, profiles)
        for name, profile in profiles.items():
            for other in profile.from_profiles:
                if other not in profiles:
                    raise self.wrong(
                        ("profiles", name, "from"), f"no profile is named {other!r}"
                    )
        return profiles

    def _profile(self, name: str, known: Mapping[str, Profile]) -> Profile:
        path = ("profiles", name)
        table = self._table(*path)
        self._known(
            path,
            table,
            "like issuer lifetime backdate curves rsa_min_bits server_auth "
            "client_auth expired_grace renew_at renew_jitter from psk token",
        )
        like = self._text((*path, "like"), table.get("like", "ldevid"))
        if name not in known and like not in known:
            raise self.wrong((*path, "like"), f"no profile is named {like!r}")
        start = known[name] if name in known else replace(known[like], name=name)
        changes: dict[str, object] = {}
        for key, value in table.items():
            where = (*path, key)
            match key:
                case "lifetime":
                    changes[key] = (
                        None if value == "never" else self._duration(where, value)
                    )
                case "backdate" | "expired_grace":
                    changes[key] = self._duration(where, value)
                case "renew_at" | "renew_jitter":
                    changes[key] = self._fraction(where, value)
                case "server_auth" | "client_auth" | "psk" | "token":
                    changes[key] = self._truth(where, value)
                case "from":
                    changes["from_profiles"] = frozenset(self._texts(where, value))
                case "issuer":
                    changes[key] = self._one_of(where, value, "issuing factory")
                case _:
                    pass
        keys = self._key_rules(path, table, start.keys)
        changed = replace(start, keys=keys, **changes)  # type: ignore[arg-type]  # each value was read by its key above
        if changed.lifetime == timedelta():
            raise self.wrong((*path, "lifetime"), "a certificate must live a while")
        return changed

    def _one_of(self, path: tuple[str, ...], value: object, names: str) -> str:
        if value not in names.split():
            raise self.wrong(path, f"one of {', '.join(names.split())} is wanted")
        return str(value)

    def _key_rules(
        self, path: tuple[str, ...], table: Mapping[str, object], rules: KeyRules
    ) -> KeyRules:
        if "curves" in table:
            where = (*path, "curves")
            curves = self._texts(where, table["curves"])
            for curve in curves:
                self._one_of(where, curve, "P-256 P-384")
            rules = replace(rules, curves=frozenset(curves))
        if "rsa_min_bits" in table:
            where = (*path, "rsa_min_bits")
            bits = self._number(where, table["rsa_min_bits"])
            if bits < _RSA_FLOOR:
                raise self.wrong(where, f"at least {_RSA_FLOOR} is wanted")
            rules = replace(rules, rsa_min_bits=bits)
        return rules


_Section = TypeVar("_Section", Hsm, Broker, Limits, Rotation, Outages, Psk, Revocation)

_HOST = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9\-]{0,61}[A-Za-z0-9])?"
    r"(\.[A-Za-z0-9]([A-Za-z0-9\-]{0,61}[A-Za-z0-9])?)*"
)
_PROFILE = re.compile(r"[a-z0-9][a-z0-9\-]{0,31}")
_MAX_NAME = 64  # ub-organization-name (RFC 5280, A.1)
_MAX_PORT = 65_535
_RSA_FLOOR = 2_048
_UNITS = {
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
    "w": timedelta(weeks=1),
}


def duration(text: str) -> timedelta | None:
    """`30d`, `12h`, `15m`, `90s`, `2w`, or `0`; None for anything else."""
    if text == "0":
        return timedelta()
    found = re.fullmatch(r"([0-9]{1,6})\s?([smhdw])", text)
    return int(found[1]) * _UNITS[found[2]] if found else None
