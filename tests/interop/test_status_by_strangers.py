"""OCSP, CRLs and the staple as openssl and curl judge them."""

from __future__ import annotations

import asyncio
import base64
from urllib.parse import quote

import pytest
from device_client import Field
from gateway_process import until
from programs import openssl


@pytest.fixture(scope="module")
def pump(site):
    return site.device("status-pump").enrolled()


def ocsp(site, *argv, issuer=None):
    """What `openssl ocsp` says after it has verified the answer."""
    return openssl(
        *("ocsp", "-issuer", issuer or site.issuing, "-CAfile", site.root),
        *("-verify_other", site.issuing, "-url", site.gateway.url("/ocsp", "http")),
        *argv,
        code=None,
    )


@pytest.mark.parametrize("digest", ["-sha1", "-sha256"])
@pytest.mark.parametrize("nonce", ["-nonce", "-no_nonce"])
def test_a_certificate_in_use_is_good(site, pump, digest, nonce):
    said = ocsp(site, digest, nonce, "-cert", pump.cert)
    assert "Response verify OK" in said
    assert f"{pump.cert}: good" in said


def test_a_factory_certificate_is_good_by_its_own_ca(site):
    board = site.device("status-board").enrolled(profile="idevid")
    said = ocsp(site, "-cert", board.cert, issuer=site.factory)
    assert "Response verify OK" in said
    assert f"{board.cert}: good" in said


def test_a_revoked_certificate_is_revoked_by_ocsp_and_crl(site):
    """The answer follows at once, the list soon after, both say the reason."""
    device = site.device("status-revoked").enrolled()
    assert f"{device.cert}: good" in ocsp(site, "-cert", device.cert)
    verify = (
        *("verify", "-x509_strict", "-CAfile", site.root, "-untrusted", site.issuing),
        *("-crl_check", "-CRLfile", site.folder / "issuing.crl.pem", device.cert),
    )
    number = fetch_crl(site)
    assert ": OK" in openssl(*verify)
    site.revoke(device.name)
    said = ocsp(site, "-cert", device.cert)
    assert "Response verify OK" in said
    assert f"{device.cert}: revoked" in said
    assert "keyCompromise" in said
    newer = until(lambda: max(fetch_crl(site) - number, 0))
    assert newer >= 1
    assert "certificate revoked" in openssl(*verify, code=None)


def fetch_crl(site, name="issuing"):
    """Fetch the CRL by curl, verify it by openssl; its number."""
    got = site.curl(f"/crl/{name}.crl", listener="http")
    assert got.status == 200
    assert "application/pkix-crl" in got.headers
    path = site.folder / f"{name}.crl.pem"
    issuer = {"issuing": site.issuing, "factory": site.factory, "root": site.root}
    said = openssl(
        *("crl", "-inform", "DER", "-out", path, "-CAfile", issuer[name], "-crlnumber"),
        give=got.body,
        code=None,
    )
    assert "verify OK" in said
    return int(said.partition("crlNumber=")[2].split()[0], 16)


@pytest.mark.parametrize("name", ["root", "factory", "issuing"])
def test_every_ca_has_a_crl_and_a_certificate_to_fetch(site, name):
    assert fetch_crl(site, name) >= 1
    got = site.curl(f"/ca/{name}.crt", listener="http")
    assert "application/pkix-cert" in got.headers
    assert "CA:TRUE" in openssl("x509", "-inform", "DER", "-text", give=got.body)


def test_a_device_chain_is_checked_against_every_crl(site, pump):
    for name in ("root", "issuing"):
        fetch_crl(site, name)
    said = openssl(
        *("verify", "-x509_strict", "-CAfile", site.root, "-untrusted", site.issuing),
        *("-crl_check_all", "-CRLfile", site.folder / "root.crl.pem"),
        *("-CRLfile", site.folder / "issuing.crl.pem", pump.cert),
    )
    assert ": OK" in said


def test_a_certificate_says_where_to_ask_about_it(site, pump):
    text = openssl("x509", "-in", pump.cert, "-noout", "-text")
    base = site.gateway.url("", "http")
    assert f"OCSP - URI:{base}/ocsp" in text
    assert f"CA Issuers - URI:{base}/ca/issuing.crt" in text
    assert f"URI:{base}/crl/issuing.crl" in text


def test_a_serial_that_was_never_issued_is_unknown(site):
    said = ocsp(site, "-serial", "0x4711")
    assert "Response verify OK" in said
    assert "0x4711: unknown" in said


def test_a_ca_of_others_is_not_spoken_for(site, tmp_path):
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    openssl(
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-nodes", "-keyout", key, "-out", cert, "-subj", "/CN=stranger"),
    )
    assert "unauthorized" in ocsp(site, "-cert", cert, issuer=cert)


def test_several_questions_in_one_request(site, pump):
    revoked = site.device("status-several").enrolled()
    site.revoke(revoked.name)
    said = ocsp(site, "-cert", pump.cert, "-cert", revoked.cert, "-serial", "0x4711")
    assert "Response verify OK" in said
    assert f"{pump.cert}: good" in said
    assert f"{revoked.cert}: revoked" in said
    assert "0x4711: unknown" in said


def test_curl_asks_in_the_path_and_may_keep_the_answer(site, pump):
    """RFC 5019: base64, escaped for URLs, slashes with it; and caches are told."""
    request = pump.folder / "ocsp.req"
    openssl(
        *("ocsp", "-issuer", site.issuing, "-cert", pump.cert, "-no_nonce"),
        *("-reqout", request),
    )
    text = base64.b64encode(request.read_bytes()).decode()
    paths = {quote(text, safe=""), quote(text, safe="/"), text.replace("+", "%2B")}
    for path in paths:
        got = site.curl(f"/ocsp/{path}", listener="http")
        assert got.status == 200
        answer = pump.folder / "ocsp.resp"
        answer.write_bytes(got.body)
        said = openssl(
            *("ocsp", "-issuer", site.issuing, "-cert", pump.cert, "-no_nonce"),
            *("-respin", answer, "-CAfile", site.root, "-verify_other", site.issuing),
            code=None,
        )
        assert "Response verify OK" in said
        assert f"{pump.cert}: good" in said
        for header in ("etag:", "last-modified:", "expires:", "max-age="):
            assert header in got.headers
    tag = got.headers.partition("etag: ")[2].splitlines()[0]
    again = site.curl(f"/ocsp/{path}", "-H", f"If-None-Match: {tag}", listener="http")
    assert again.status == 304
    assert again.body == b""


def test_the_staple_is_an_ocsp_answer_that_openssl_verifies(site, tmp_path):
    """In both versions; the answer is about the certificate that came with it."""

    async def shake_hands(newest):
        async with Field(site.gateway).https(newest=newest) as http:
            seen = http.stream.established
            return seen.server_chain[0], seen.staple

    for newest in ("TLSv1.2", "TLSv1.3"):
        leaf, staple = asyncio.run(shake_hands(newest))
        cert, answer = tmp_path / "server.pem", tmp_path / "staple"
        answer.write_bytes(staple)
        openssl("x509", "-inform", "DER", "-out", cert, give=leaf)
        said = openssl(
            *("ocsp", "-issuer", site.issuing, "-cert", cert, "-respin", answer),
            *("-CAfile", site.root, "-verify_other", site.issuing, "-no_nonce"),
            code=None,
        )
        assert "Response verify OK" in said
        assert f"{cert}: good" in said
        openssl(
            *("verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", site.root),
            *("-untrusted", site.issuing, "-verify_hostname", "localhost", cert),
        )


def test_curl_is_refused_in_words_by_the_plain_listener(site):
    for path, status in (("/", 404), ("/ocsp", 405), ("/crl/nothing.crl", 404)):
        got = site.curl(path, listener="http")
        assert got.status == status
        assert got.body.strip()
