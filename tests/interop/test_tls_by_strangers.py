"""TLS by `openssl s_client` and curl: every way in, and every way that is shut."""

from __future__ import annotations

from subprocess import PIPE, STDOUT, Popen

import pytest
from programs import by_psk, openssl, program, told

VERSIONS = ["-tls1_2", "-tls1_3"]


@pytest.fixture(scope="module")
def pump(site):
    """A device with certificate and PSK."""
    device = site.device("tls-pump").enrolled()
    device.psk = site.psk(device)
    return device


@pytest.fixture(scope="module")
def small(narrow_site):
    """The same at the gateway that allows plain PSK."""
    device = narrow_site.device("small").enrolled()
    return narrow_site.psk(device)


@pytest.mark.parametrize(
    ("suites", "spoken"),
    [
        ("ECDHE-PSK-CHACHA20-POLY1305", "ECDHE-PSK-CHACHA20-POLY1305"),
        ("ECDHE-PSK-AES128-CBC-SHA256", "ECDHE-PSK-AES128-CBC-SHA256"),
        ("DHE-PSK-AES128-GCM-SHA256", "DHE-PSK-AES128-GCM-SHA256"),
        ("DHE-PSK-CHACHA20-POLY1305", "DHE-PSK-CHACHA20-POLY1305"),
        # Whatever the client prefers, elliptic curves go before DHE.
        (
            "DHE-PSK-AES128-GCM-SHA256:ECDHE-PSK-CHACHA20-POLY1305",
            "ECDHE-PSK-CHACHA20-POLY1305",
        ),
    ],
)
def test_psk_suites_of_tls_1_2(site, pump, suites, spoken):
    who = told(site.s_client(*by_psk(pump.psk, "-tls1_2", suites)))
    assert who is not None
    assert (who["device"], who["auth"]) == ("tls-pump", "psk")
    assert (who["tls"], who["cipher"]) == ("TLSv1.2", spoken)
    assert who["generation"] == 1


def test_psk_of_tls_1_3(site, pump):
    who = told(site.s_client(*by_psk(pump.psk, "-tls1_3")))
    assert (who["device"], who["auth"], who["tls"]) == ("tls-pump", "psk", "TLSv1.3")
    assert who["resumed"] is False


@pytest.mark.parametrize("suite", ["PSK-AES128-GCM-SHA256", "PSK-AES128-CCM"])
def test_plain_psk_is_refused_where_it_is_not_allowed(
    site, narrow_site, pump, small, suite
):
    printed = site.s_client(*by_psk(pump.psk, "-tls1_2", suite))
    assert told(printed) is None
    assert "handshake failure" in printed
    # The twin: the same at a listener that says `plain_psk = true`.
    who = told(narrow_site.s_client(*by_psk(small, "-tls1_2", suite)))
    assert (who["auth"], who["cipher"]) == ("psk", suite)


@pytest.mark.parametrize(
    "suite",
    [
        "RSA-PSK-AES128-GCM-SHA256",
        "ECDHE-PSK-NULL-SHA256",
        "PSK-NULL-SHA256",
        "ECDHE-PSK-AES128-CBC-SHA",
    ],
)
def test_weak_psk_suites_are_refused_even_there(narrow_site, small, suite):
    printed = narrow_site.s_client(*by_psk(small, "-tls1_2", f"{suite}:@SECLEVEL=0"))
    assert told(printed) is None


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("wrong", ["key", "identity", "generation", "nonsense"])
def test_a_wrong_psk_gets_nothing(site, pump, version, wrong):
    """Unknown identities and wrong keys fail alike, whoever they name."""
    made_up = {
        "key": {**pump.psk, "key": "00" * 32},
        "identity": {**pump.psk, "identity": "tls-nobody#1"},
        "generation": {**pump.psk, "identity": "tls-pump#7"},
        "nonsense": {**pump.psk, "identity": "who am I?"},
    }[wrong]
    printed = site.s_client(*by_psk(made_up, version))
    who = told(printed)
    # In TLS 1.3 an identity that is none of ours is passed over, and proves nobody.
    assert who is None or (wrong == "nonsense" and who["auth"] is None)
    if wrong != "nonsense":
        alert = "decrypt error" if version == "-tls1_3" else "bad record mac"
        assert alert in printed


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", ["certificate", "psk"])
def test_sessions_of_both_kinds_resume(site, pump, version, mode, tmp_path):
    proof = (
        [version, *pump.s_client]
        if mode == "certificate"
        else by_psk(pump.psk, version)
    )
    session = tmp_path / "session"
    first = told(site.s_client(*proof, "-sess_out", session))
    assert (first["auth"], first["resumed"]) == (mode, False)
    # The session is all it has to show: no certificate, no key.
    alone = [version, "-sess_in", session]
    if version == "-tls1_2" and mode == "psk":
        alone = [*by_psk(pump.psk, version), "-sess_in", session]
    if version == "-tls1_3" and mode == "psk":
        alone += ["-ciphersuites", "TLS_AES_128_GCM_SHA256"]
    again = told(site.s_client(*alone))
    assert (again["auth"], again["resumed"]) == (mode, True)
    assert again["device"] == "tls-pump"
    assert (again["serial"], again["generation"]) == (
        first["serial"],
        first["generation"],
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_a_revoked_device_is_told_so_when_it_resumes(site, version, tmp_path):
    name = f"resumes-revoked{version}".replace("_", "-")
    device = site.device(name).enrolled()
    session = tmp_path / "session"
    assert told(site.s_client(version, *device.s_client, "-sess_out", session))
    site.revoke(name)
    printed = site.s_client(version, "-sess_in", session)
    assert "Reused, TLSv1" in printed
    assert told(printed) is None
    assert "HTTP/1.1 403" in printed
    assert "revoked" in printed


@pytest.mark.parametrize("version", ["-tls1", "-tls1_1"])
def test_old_versions_are_refused_with_the_alert_for_it(site, version):
    printed = site.s_client(version, "-cipher", "ALL:@SECLEVEL=0")
    assert told(printed) is None
    assert "alert protocol version" in printed


@pytest.mark.parametrize("listener", ["https", "mqtts"])
def test_a_foreign_certificate_gets_unknown_ca(site, listener, tmp_path):
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-nodes", "-keyout", key, "-out", cert, "-subj", "/CN=stranger"),
    )
    for version in VERSIONS:
        printed = site.s_client(version, "-cert", cert, "-key", key, listener=listener)
        assert told(printed) is None
        assert "alert unknown ca" in printed


def test_a_certificate_that_only_looks_like_ours_gets_in_nowhere(site, pump, tmp_path):
    """The issuing CA's name, another key: the signature decides."""
    ca_key, ca = tmp_path / "ca.key", tmp_path / "ca.pem"
    openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-nodes", "-keyout", ca_key, "-out", ca),
        *("-subj", "/O=Birthmark/CN=Issuing CA"),
    )
    names = ("x509", "-noout", "-subject", "-in")
    assert openssl(*names, ca) == openssl(*names, site.issuing)
    key, csr, cert = (tmp_path / one for one in ("k.pem", "c.csr", "c.pem"))
    openssl(
        *("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-nodes", "-keyout", key, "-out", csr),
        *("-subj", "/serialNumber=tls-pump/CN=tls-pump"),
    )
    openssl(
        *("x509", "-req", "-in", csr, "-CA", ca, "-CAkey", ca_key, "-out", cert),
        *("-set_serial", f"0x{pump.serial}", "-days", "1"),
    )
    printed = site.s_client("-tls1_2", "-cert", cert, "-key", key)
    assert told(printed) is None
    assert "alert" in printed
    # The twin: the certificate that the CA made, with the same names.
    assert told(site.s_client("-tls1_2", *pump.s_client))["serial"] == pump.serial


def test_alpn_that_nobody_speaks_is_refused(site):
    printed = site.s_client("-alpn", "h2,spdy/3")
    assert told(printed) is None
    assert "no application protocol" in printed
    printed = site.s_client("-alpn", "h2,http/1.1")
    assert told(printed) is not None
    assert "ALPN protocol: http/1.1" in printed


def test_renegotiation_is_refused_and_its_security_indicated(site):
    printed = site.s_client("-tls1_2")
    assert "Secure Renegotiation IS supported" in printed
    assert "Compression: NONE" in printed
    assert "Extended master secret: yes" in printed
    # A line that is R alone makes s_client ask for it; it ends by the refusal.
    port = site.gateway.ready["https"]
    argv = [program("openssl"), "s_client", "-tls1_2", "-connect", f"localhost:{port}"]
    with Popen(argv, stdin=PIPE, stdout=PIPE, stderr=STDOUT, text=True) as client:
        client.stdin.write("R\n")
        client.stdin.flush()
        printed = client.stdout.read()
    assert "RENEGOTIATING" in printed
    assert "no renegotiation" in printed


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("listener", ["https", "mqtts"])
def test_the_staple_says_good(site, version, listener):
    printed = site.s_client(version, "-status", listener=listener, request="x")
    assert "OCSP Response Status: successful" in printed
    assert "Cert Status: good" in printed


def test_curl_verifies_the_staple(site):
    """It checks signature, times and status, and fails without a staple."""
    assert site.curl("/device/v1/whoami", "--cert-status").status == 200


def test_the_server_sends_its_chain_and_names_its_clients_cas(site):
    printed = site.s_client("-tls1_2", "-showcerts", "-verify_return_error")
    assert "Verify return code: 0 (ok)" in printed
    assert printed.count("-----BEGIN CERTIFICATE-----") >= 2
    assert "Acceptable client certificate CA names" in printed
    assert "Issuing CA" in printed.partition("Acceptable client")[2]


@pytest.mark.parametrize(
    ("offered", "spoken"),
    [("X25519", "x25519"), ("P-256", "secp256r1"), ("P-384", "secp384r1")],
)
def test_groups_that_devices_have(site, offered, spoken):
    assert told(site.s_client("-tls1_3", "-groups", offered))["group"] == spoken


def test_without_extended_master_secret_nothing_is_resumed(site, pump, tmp_path):
    """RFC 7627, 5.3: such a session could be moved to another peer.

    Devices that cannot do it (strongSwan's TLS) shake hands in full each time.
    """
    conf = tmp_path / "openssl.cnf"
    for options, resumes in (
        ("ExtendedMasterSecret", True),
        ("-ExtendedMasterSecret", False),
    ):
        session = tmp_path / options
        conf.write_text(
            "openssl_conf = o\n[o]\nssl_conf = s\n[s]\nsystem_default = d\n"
            f"[d]\nOptions = {options}\n"
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPENSSL_CONF", str(conf))
            first = site.s_client("-tls1_2", *pump.s_client, "-sess_out", session)
            again = site.s_client("-tls1_2", *pump.s_client, "-sess_in", session)
        assert told(first)["device"] == "tls-pump"
        assert f"Extended master secret: {'yes' if resumes else 'no'}" in first
        who = told(again)
        assert (who is not None and who["resumed"]) is resumes
