"""birthmark.toml: what is in sight, what is refused, and where the fault is."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provisioning import config
from provisioning.model.errors import ConfigError, Unusable
from provisioning.x509.profiles import DEFAULTS

FOLDER = Path("/data")
HSM = '[hsm]\nmodule = "/lib/softhsm.so"\n'


def parsed(text: str) -> config.Config:
    return config.parse(HSM + text, FOLDER)


def refused(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config.parse(text, FOLDER)
    return caught.value


def verdict(text: str) -> str:
    """`taken`, or the refusal; any other exception is a fault."""
    try:
        config.parse(text, FOLDER)
    except ConfigError as error:
        return f"{error.where}: {error.why}"
    return "taken"


def default() -> str:
    return config.default_toml(
        org='Ac"me & Söhne',
        domain="acme.test",
        hosts=("gw.acme.test", "192.0.2.1"),
        module="/lib/softhsm.so",
        softhsm_conf="hsm/softhsm2.conf",
        ports={"https": 1443},
    )


def test_what_init_writes_says_what_init_was_told():
    read = config.parse(default(), FOLDER)
    assert read.org == 'Ac"me & Söhne'
    assert read.domain.text == "acme.test"
    assert read.hosts == ("gw.acme.test", "192.0.2.1")
    assert read.listen.https == config.Listener(1443)
    assert read.listen.mqtts == config.Listener(8883)
    assert read.listen.coaps is None
    assert read.listen.operator is None
    assert read.hsm.softhsm_conf == "hsm/softhsm2.conf"


def test_the_comments_that_init_writes_are_the_defaults():
    """Taking away the `#` of every shown default changes nothing but its own line."""
    shown = [
        line[2:] if line.startswith("# ") and " = " in line else line
        for line in default().splitlines()
        if "registry.sqlite3" not in line and "public = " not in line
    ]
    text = "\n".join(shown).replace("# [profiles", "[profiles")
    uncommented = config.parse(text, FOLDER)
    plain = config.parse(default(), FOLDER)
    # The profile's fraction is shown rounded.
    assert uncommented.profiles["ldevid"].lifetime == timedelta(days=30)
    for name in ("limits", "rotation", "outages", "psk", "revocation", "broker"):
        assert getattr(uncommented, name) == getattr(plain, name), name
    assert uncommented.hsm == plain.hsm
    assert uncommented.listen == plain.listen


def test_an_empty_table_has_every_default():
    read = parsed("")
    assert read.profiles == DEFAULTS
    assert read.registry_url == "sqlite+aiosqlite:////data/registry.sqlite3"
    assert read.revocation.crl_lifetime == timedelta(days=7)
    assert read.revocation.ocsp_lifetime == timedelta(hours=24)
    assert read.rotation.grace == timedelta(hours=1)
    assert read.outages.registry_grace == timedelta(seconds=60)
    assert read.broker.managed
    assert read.tls_policy == "modern"


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        (HSM + '[fleet]\norg = "A"\nogr = "B"\n', 5, "ogr"),
        (HSM + "[flete]\n", 3, "flete"),
        (HSM + "\n[listen.https]\nport = 99999\n", 5, "65535"),
        (HSM + '[listen.https]\nport = "8443"\n', 4, "whole number"),
        (HSM + "[listen.https]\nport = true\n", 4, "whole number"),
        (HSM + "[listen.htps]\n", 3, "htps"),
        (HSM + '[listen.mqtts]\npublic = "no-port"\n', 4, "HOST:PORT"),
        (HSM + '[fleet]\nhosts = ["a b"]\n', 4, "host name"),
        (HSM + "[fleet]\nhosts = []\n", 4, "at least one"),
        (HSM + '[fleet]\ndomain = "Upper"\n', 4, "lower-case"),
        (HSM + f'[fleet]\norg = "{"x" * 65}"\n', 4, "64"),
        (HSM + "[limits]\nhandshakes = -1\n", 4, "not negative"),
        (HSM + '[limits]\nhandshake_deadline = "soon"\n', 4, "duration"),
        (HSM + "[limits]\nhandshake_deadline = 10\n", 4, "duration"),
        (HSM + '[broker]\nmanaged = "yes"\n', 4, "true or false"),
        (HSM + '[profiles.ldevid]\nlifetime = "0"\n', 4, "live"),
        (HSM + "[profiles.ldevid]\nrenew_at = 2\n", 4, "between 0 and 1"),
        (HSM + '[profiles.pump]\nlike = "none"\n', 4, "none"),
        (HSM + '[profiles.ldevid]\nfrom = ["none"]\n', 4, "none"),
        (HSM + '[profiles.ldevid]\ncurves = ["P-521"]\n', 4, "P-256"),
        (HSM + "[profiles.ldevid]\nrsa_min_bits = 1024\n", 4, "2048"),
        (HSM + '[profiles.ldevid]\nissuer = "root"\n', 4, "issuing"),
        (HSM + "[profiles.UPPER]\n", 3, "a-z"),
        (HSM + "[psk]\ncache_for = \n", 4, "TOML"),
        (HSM + '[tls]\npolicy = "old"\n', 4, "modern"),
        (HSM + "[listen.http]\nport = 0\n", 4, "fixed"),
        ('[fleet]\norg = "A"\n[hsm]\n', 3, "missing"),
    ],
)
def test_a_fault_is_named_with_its_line(text: str, line: int, word: str):
    error = refused(text)
    assert error.where == f"birthmark.toml:{line}", error
    assert word in error.why


def test_a_table_where_a_value_stands_is_refused():
    assert "table" in refused("hsm = 1\n").why


def test_port_0_is_taken_where_certificates_do_not_name_it():
    read = parsed(
        "[listen.https]\nport = 0\n"
        '[listen.http]\nport = 0\npublic = "pki.acme.test:80"\n'
    )
    assert read.url("https", 50123) == "https://localhost:50123"
    assert read.url("http", 50124) == "http://pki.acme.test:80"
    assert read.ca.http_url == "http://pki.acme.test:80"


def test_public_addresses_are_named_where_they_are_given():
    read = parsed(
        '[fleet]\nhosts = ["::1"]\n[listen.https]\npublic = "gw.acme.test:443"\n'
        "[listen.mqtts]\nenabled = false\n"
    )
    assert read.url("https") == "https://gw.acme.test:443"
    assert read.url("mqtts") is None
    assert read.url("http") == "http://[::1]:8080"
    assert read.ca.urls("issuing").crl == "http://[::1]:8080/crl/issuing.crl"


def test_a_fleet_may_add_profiles_and_change_those_that_are_there():
    read = parsed(
        '[profiles.ldevid]\nlifetime = "1h"\nexpired_grace = "0"\n'
        '[profiles.pump]\nlike = "ldevid"\nlifetime = "never"\nfrom = ["ldevid"]\n'
    )
    assert read.profiles["ldevid"].lifetime == timedelta(hours=1)
    assert read.profiles["ldevid"].expired_grace == timedelta()
    assert read.profiles["ldevid"].psk
    pump = read.profiles["pump"]
    assert (pump.name, pump.lifetime) == ("pump", None)
    assert pump.from_profiles == {"ldevid"}
    assert DEFAULTS["ldevid"].lifetime == timedelta(days=30), "the defaults stay"


@given(st.text(max_size=200))
def test_nonsense_is_refused_as_such(text: str):
    assert verdict(text).startswith(("taken", "birthmark.toml"))


@given(
    st.recursive(
        st.booleans() | st.integers(-5, 70000) | st.sampled_from(["1h", "x", ""]),
        lambda inner: st.lists(inner, max_size=2),
        max_leaves=3,
    ),
    st.sampled_from(
        [
            "fleet.org",
            "fleet.hosts",
            "fleet.domain",
            "listen.https.port",
            "listen.https.hosts",
            "listen.https.public",
            "listen.http.enabled",
            "hsm.pin",
            "limits.connections",
            "limits.keep_alive",
            "registry.url",
            "profiles.x.lifetime",
            "profiles.x.from",
            "profiles.x.curves",
            "profiles.x.psk",
            "profiles.x.rsa_min_bits",
            "tls.policy",
            "broker.host",
        ]
    ),
)
def test_any_value_anywhere_is_taken_or_refused_in_words(value, key: str):
    def toml(one: object) -> str:
        if isinstance(one, list):
            return "[" + ", ".join(toml(each) for each in one) + "]"
        if isinstance(one, bool):
            return str(one).lower()
        return str(one) if isinstance(one, int) else f'"{one}"'

    text = f'hsm.module = "m"\n{key} = {toml(value)}\n'
    assert verdict(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30d", timedelta(days=30)),
        ("90s", timedelta(seconds=90)),
        ("2w", timedelta(weeks=2)),
        ("0", timedelta()),
        ("15 m", timedelta(minutes=15)),
        ("", None),
        ("d", None),
        ("1y", None),
        ("-1d", None),
        ("1d1h", None),
        ("٣d", None),
    ],
)
def test_durations_are_read(text: str, expected: timedelta | None):
    assert config.duration(text) == expected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "data"
    (made / "public" / "ca").mkdir(parents=True)
    (made / "hsm").mkdir()
    (made / "birthmark.toml").write_text(default(), encoding="utf-8")
    (made / "hsm" / "pin").write_text("1234")
    (made / "public" / "ca" / "root.crt").write_text("x")
    for path, mode in (
        (made, 0o700),
        (made / "hsm", 0o700),
        (made / "birthmark.toml", 0o600),
        (made / "hsm" / "pin", 0o600),
        (made / "public", 0o755),
        (made / "public" / "ca" / "root.crt", 0o644),
    ):
        path.chmod(mode)
    return made


def test_a_folder_that_only_its_owner_reads_is_taken(folder: Path):
    assert config.load(folder).folder == folder
    folder.chmod(0o711)
    assert config.load(folder), "others may pass through, towards public/"


@pytest.mark.parametrize("name", ["", "hsm", "hsm/pin", "birthmark.toml"])
def test_what_others_may_read_is_refused_with_the_cure(folder: Path, name: str):
    path = folder / name
    path.chmod(path.stat().st_mode | 0o040)
    with pytest.raises(Unusable) as caught:
        config.load(folder)
    assert "chmod" in caught.value.why
    assert str(path) in f"{caught.value.what} {caught.value.why}"


def test_a_missing_folder_or_file_names_the_command_that_makes_it(
    folder: Path, tmp_path: Path
):
    with pytest.raises(Unusable, match="birthmark init"):
        config.load(tmp_path / "nowhere")
    (folder / "birthmark.toml").unlink()
    with pytest.raises(ConfigError, match="birthmark init"):
        config.load(folder)


def test_a_file_that_is_not_text_is_refused(folder: Path):
    (folder / "birthmark.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError):
        config.load(folder)
