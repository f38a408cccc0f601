"""EST by curl and by strongSwan's `pki`: enrolment and its renewal."""

from __future__ import annotations

import base64
import time

from programs import PEM, openssl, run


def names_of(site, device):
    return openssl(
        "x509", "-in", device.cert, "-noout", "-subject", "-ext", "subjectAltName"
    )


def test_curl_enrols_by_token_and_the_chain_holds(site):
    pump = site.device("curl-pump").enrolled()
    told = names_of(site, pump)
    assert "serialNumber = curl-pump" in told
    assert "URI:spiffe://birthmark.local/device/curl-pump" in told
    openssl(
        *("verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", site.root),
        *("-untrusted", site.issuing, pump.cert),
    )


def test_curl_enrols_in_tls_1_2_alone(site):
    pump = site.device("curl-12").enrolled("--tls-max", "1.2")
    got = site.curl("/device/v1/whoami", *pump.mtls, "--tls-max", "1.2")
    assert got.document["tls"] == "TLSv1.2"
    assert got.document["auth"] == "certificate"
    assert got.document["serial"] == pump.serial


def test_curl_that_waits_to_be_asked_for_the_body_is_asked(site):
    """`Expect: 100-continue`: without an answer curl would wait for a second."""
    pump = site.device("curl-expects")
    token = site.gateway.token_now("curl-expects")
    user = ("--user", f"curl-expects:{token}", "--expect100-timeout", "8")
    start = time.monotonic()
    got = pump.ask("simpleenroll", "-H", "Expect: 100-continue", *user)
    assert time.monotonic() - start < 6
    pump.keep(got)
    assert "HTTP/1.1 100 Continue" in got.said


def test_curl_renews_by_its_certificate(site):
    old = site.device("curl-renews").enrolled()
    new = site.device("curl-renews-next")  # the next key, and a folder for it
    openssl(
        *("req", "-new", "-key", new.key, "-subj", "/CN=curl-renews"),
        *("-outform", "DER", "-out", new.csr),
    )
    new.keep(new.ask("simplereenroll", *old.mtls))
    assert new.serial != old.serial
    # What the CSR left out is filled in: most clients leave out the SAN.
    assert names_of(site, new) == names_of(site, old)
    got = site.curl("/device/v1/whoami", *new.mtls)
    assert got.document["serial"] == new.serial


def test_curl_trades_a_factory_certificate_for_an_operational_one(site):
    board = site.device("curl-board").enrolled(profile="idevid")
    ends = openssl("x509", "-in", board.cert, "-noout", "-enddate")
    assert "9999" in ends
    openssl(
        *("verify", "-x509_strict", "-CAfile", site.root),
        *("-untrusted", site.factory, board.cert),
    )
    pump = site.device("curl-board-pump")
    openssl(
        *("req", "-new", "-key", pump.key, "-subj", "/CN=curl-board"),
        *("-outform", "DER", "-out", pump.csr),
    )
    pump.keep(pump.ask("simpleenroll", *board.mtls))
    got = site.curl("/device/v1/whoami", *pump.mtls)
    assert got.document["device"] == "curl-board"


def test_curl_may_send_der_or_base64_however_it_is_broken(site):
    pump = site.device("curl-forms")
    token = site.gateway.token_now("curl-forms")
    der = pump.csr.read_bytes()
    answers = set()
    for body in (
        der,
        base64.b64encode(der),
        base64.encodebytes(der),
        base64.encodebytes(der).replace(b"\n", b"\r\n"),
    ):
        got = pump.ask("simpleenroll", "--user", f"curl-forms:{token}", body=body)
        assert got.status == 200, got
        answers.add(got.body)
    assert len(answers) == 1  # the same request, whatever its form


def test_openssl_reads_cacerts_and_csrattrs(site):
    body = site.curl("/.well-known/est/cacerts").body
    told = openssl(
        "pkcs7", "-inform", "DER", "-print_certs", give=base64.b64decode(body)
    )
    found = {pem.strip() for pem in PEM.findall(told)}
    assert found == {one.read_text().strip() for one in (site.issuing, site.root)}
    body = site.curl("/.well-known/est/csrattrs").body
    parsed = openssl("asn1parse", "-inform", "DER", give=base64.b64decode(body))
    assert "id-ecPublicKey" in parsed
    assert "ecdsa-with-SHA256" in parsed


def test_strongswan_enrols_and_renews(site, tmp_path):
    """`pki` speaks TLS 1.2, and wants root and issuing CA named."""
    url = site.gateway.url()
    trust = ("--cacert", site.root, "--cacert", site.issuing)

    def request(name):
        key, csr = tmp_path / f"{name}.key", tmp_path / f"{name}.csr"
        key.write_bytes(
            run("pki", "--gen", "--type", "ecdsa", "--size", "256", "--outform", "pem")
        )
        csr.write_bytes(
            run("pki", "--req", "--in", key, "--type", "ecdsa", "--dn", "CN=swan")
        )
        return key, csr

    def serial(name, pem):
        path = tmp_path / f"{name}.pem"
        path.write_bytes(pem)
        told = openssl("x509", "-in", path, "-noout", "-serial")
        return path, told.strip().partition("=")[2].lower()

    key, csr = request("first")
    token = site.gateway.token_now("swan")
    est = ("--est", "--url", url, *trust, "--outform", "pem", "--in")
    cert, first = serial("first", run("pki", *est, csr, "--userpass", f"swan:{token}"))
    assert "CN = swan" in openssl("x509", "-in", cert, "-noout", "-subject")
    _, csr = request("second")
    _, second = serial("second", run("pki", *est, csr, "--cert", cert, "--key", key))
    assert second != first
    shown = site.gateway.command("devices", "show", "swan")
    assert [one["serial"] for one in shown["credentials"]] == [first, second]
