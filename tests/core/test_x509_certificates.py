"""Profiles, certificates built from intentions, and their inspection."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from software_ca import (
    DOMAIN,
    NOW,
    PUMP,
    PUMP_URI,
    issuer_of,
    make_ca,
    mutated,
    new_key,
    next_serial,
    openssl,
    spki_of,
)

from provisioning.model.errors import PeerError, Unusable
from provisioning.model.ids import DeviceId, Serial, TrustDomain
from provisioning.x509.build import (
    Intention,
    Issuer,
    Term,
    ca_certificate,
    ca_name,
    device_certificate,
    root_certificate,
    server_certificate,
)
from provisioning.x509.inspect import inspect, peer_facts
from provisioning.x509.profiles import DEFAULTS, NO_END, validity

CA = make_ca()
LOAD = x509.load_der_x509_certificate
RSA_KEY = rsa.generate_private_key(65537, 2048)


def verify(folder, *options: str, file: str) -> str:
    """The chain by openssl's strict rules (RFC 5280)."""
    anchors = ["-CAfile", "root.pem", "-untrusted", "issuing.pem"]
    return openssl("verify", "-x509_strict", *options, *anchors, file, cwd=folder)


# Profiles -----------------------------------------------------------------------
def test_validity_is_backdated_and_in_whole_seconds():
    now = datetime(2026, 3, 1, 12, 0, 0, 999_999, tzinfo=UTC)
    assert validity(DEFAULTS["ldevid"], now) == (
        datetime(2026, 3, 1, 11, tzinfo=UTC),
        datetime(2026, 3, 31, 12, tzinfo=UTC),
    )


def test_a_factory_identity_has_no_end():
    assert validity(DEFAULTS["idevid"], NOW)[1] == NO_END


def test_nothing_outlives_its_issuer():
    end = NOW + timedelta(days=3)
    for profile in DEFAULTS.values():
        assert validity(profile, NOW, end)[1] == end


def test_a_server_certificate_lives_ninety_days_at_most():
    not_before, not_after = validity(DEFAULTS["server"], NOW)
    assert not_after - not_before <= timedelta(days=90)


def test_no_device_enrols_for_what_operators_give():
    for name in ("server", "station", "operator"):
        profile = DEFAULTS[name]
        assert not any((profile.psk, profile.token, profile.from_profiles))


# Certificates -------------------------------------------------------------------
@pytest.mark.parametrize(
    "public_key",
    [
        new_key().public_key(),
        ec.generate_private_key(ec.SECP384R1()).public_key(),
        RSA_KEY.public_key(),
    ],
    ids=["P-256", "P-384", "RSA"],
)
@pytest.mark.parametrize("profile", ["idevid", "ldevid"])
def test_a_device_certificate_passes_openssl_and_our_inspection(
    tmp_path, profile, public_key
):
    intention = CA.intention(profile=profile, public_key=public_key)
    der = device_certificate(intention, CA.issuing, CA.key)
    inspect(der, intention, CA.issuing)
    CA.write_pem(tmp_path, device=der)
    assert "OK" in verify(tmp_path, "-purpose", "sslclient", file="device.pem")


def test_a_device_certificate_is_an_svid_of_the_device():
    certificate = LOAD(CA.device())
    assert [(a.rfc4514_attribute_name, a.value) for a in certificate.subject] == [
        ("2.5.4.5", "pump-7"),
        ("CN", "pump-7"),
    ]
    extensions = certificate.extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.UniformResourceIdentifier(PUMP_URI)]
    constraints = extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca) == (True, False)
    use = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(use) == [ExtendedKeyUsageOID.CLIENT_AUTH]


@pytest.mark.parametrize(("key", "enciphers"), [(new_key(), False), (RSA_KEY, True)])
def test_only_rsa_keys_encipher(key, enciphers):
    certificate = LOAD(CA.device(public_key=key.public_key()))
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert usage.value.key_encipherment is enciphers


def test_what_the_issuer_publishes_is_named_in_the_certificate():
    extensions = LOAD(CA.device()).extensions
    access = extensions.get_extension_for_class(x509.AuthorityInformationAccess)
    assert [a.access_location.value for a in access.value] == [
        CA.issuing.urls.ocsp,
        CA.issuing.urls.issuer,
    ]
    lists = extensions.get_extension_for_class(x509.CRLDistributionPoints).value
    assert [n.value for p in lists for n in p.full_name] == [CA.issuing.urls.crl]
    authority = extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert authority.key_identifier == CA.issuing.key_id


def test_no_end_is_written_as_the_rfc_has_it(tmp_path):
    CA.write_pem(tmp_path, device=CA.device(profile="idevid"))
    for file in ("device.pem", "root.pem", "issuing.pem"):
        shown = openssl("asn1parse", "-in", file, cwd=tmp_path)
        assert ":99991231235959Z" in shown
        assert "UTCTIME" in shown  # notBefore, which is before 2050


def test_the_hierarchy_passes_openssl(tmp_path):
    CA.write_pem(tmp_path)
    assert "OK" in verify(tmp_path, file="issuing.pem")
    constraints = CA.issuing.certificate.extensions.get_extension_for_class(
        x509.BasicConstraints
    )
    assert constraints.critical
    assert constraints.value.path_length == 0


def test_a_ca_below_the_issuing_ca_is_not_believed(tmp_path):
    key = new_key()
    name, term = ca_name("Too deep"), Term(next_serial(), NOW, NO_END)
    der = ca_certificate(name, key.public_key(), term, CA.issuing, CA.key)
    leaf = device_certificate(CA.intention(), issuer_of("deep", der), key)
    CA.write_pem(tmp_path, deep=der, leaf=leaf)
    with pytest.raises(AssertionError, match="path length constraint exceeded"):
        verify(tmp_path, "-untrusted", "deep.pem", file="leaf.pem")


def test_a_server_is_found_by_name_and_by_address(tmp_path):
    der = server_certificate(
        ["gateway.example", "192.0.2.1", "[2001:db8::1]"],
        spki_of(new_key().public_key()),
        Term(next_serial(), NOW, NOW + timedelta(days=89)),
        CA.issuing,
        CA.key,
    )
    CA.write_pem(tmp_path, server=der)
    for options in (
        ("-verify_hostname", "gateway.example"),
        ("-verify_ip", "192.0.2.1"),
        ("-verify_ip", "2001:db8::1"),
    ):
        shown = verify(tmp_path, "-purpose", "sslserver", *options, file="server.pem")
        assert "OK" in shown
    with pytest.raises(AssertionError, match="ostname mismatch"):
        verify(tmp_path, "-verify_hostname", "other.example", file="server.pem")


def test_a_server_certificate_is_none_for_clients(tmp_path):
    term = Term(next_serial(), NOW, NOW + timedelta(days=89))
    spki = spki_of(new_key().public_key())
    der = server_certificate(["a.example"], spki, term, CA.issuing, CA.key)
    CA.write_pem(tmp_path, server=der)
    with pytest.raises(AssertionError, match="purpose"):
        verify(tmp_path, "-purpose", "sslclient", file="server.pem")


def test_a_ca_certificate_without_key_identifier_makes_no_issuer():
    bare = (
        x509.CertificateBuilder()
        .subject_name(ca_name("Bare"))
        .issuer_name(ca_name("Bare"))
        .public_key(CA.key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW)
        .sign(CA.key, hashes.SHA256())
    )
    with pytest.raises(ValueError, match="subject key identifier"):
        Issuer("bare", bare, CA.issuing.urls)


# Inspection ---------------------------------------------------------------------
INTENTION = CA.intention()
DEVICE = device_certificate(INTENTION, CA.issuing, CA.key)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"device": DeviceId.parse("pump-8")}, "subject"),
        ({"domain": TrustDomain.parse("other.example")}, "extensions"),
        ({"serial": Serial(4711)}, "serialNumber"),
        ({"profile": DEFAULTS["server"]}, "extensions"),
        ({"not_before": NOW - timedelta(days=2)}, "notBefore"),
        ({"not_after": NOW + timedelta(days=900)}, "notAfter"),
        ({"public_key_der": spki_of(new_key().public_key())}, "subjectPublicKeyInfo"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_a_certificate_that_is_not_the_intended_one_never_leaves(change, word):
    intention = replace(INTENTION, **change)
    with pytest.raises(Unusable, match=word):
        inspect(DEVICE, intention, CA.issuing)
    inspect(device_certificate(intention, CA.issuing, CA.key), intention, CA.issuing)


def test_a_certificate_signed_by_another_key_never_leaves():
    der = device_certificate(INTENTION, CA.issuing, new_key())
    with pytest.raises(Unusable, match="another key under this label"):
        inspect(der, INTENTION, CA.issuing)


def test_a_certificate_of_another_issuer_never_leaves():
    other = make_ca()
    der = device_certificate(INTENTION, CA.issuing, CA.key)
    with pytest.raises(Unusable, match="extensions"):  # the key identifier
        inspect(der, INTENTION, other.issuing)


@given(mutated([DEVICE]))
def test_no_octet_can_be_changed_unnoticed(der):
    if der == DEVICE:
        inspect(der, INTENTION, CA.issuing)
    else:
        with pytest.raises(Unusable):
            inspect(der, INTENTION, CA.issuing)


# Peers --------------------------------------------------------------------------
def test_a_peers_certificate_tells_who_it_is():
    facts = peer_facts(DEVICE)
    assert facts.device == PUMP
    assert facts.serial == INTENTION.serial
    assert (facts.not_before, facts.not_after) == (
        INTENTION.not_before,
        INTENTION.not_after,
    )
    assert facts.issuer_dn_der == CA.issuing.name_der


def test_certificates_that_name_no_device_are_unknown():
    term = Term(next_serial(), NOW, NOW + timedelta(days=89))
    spki = spki_of(new_key().public_key())
    server = server_certificate(["pump-7"], spki, term, CA.issuing, CA.key)
    root = root_certificate(ca_name("pump-7"), CA.key, term)
    for der in (server, root, CA.responder_der, b"", b"0\x03\x02\x01\x01"):
        with pytest.raises(PeerError) as caught:
            peer_facts(der)
        assert caught.value.refusal.code == "credential_unknown"


def test_subject_and_spiffe_id_must_name_the_same_device():
    named = Intention(
        DeviceId.parse("pump-8"),
        DOMAIN,
        next_serial(),
        DEFAULTS["ldevid"],
        NOW,
        NO_END,
        INTENTION.public_key_der,
    )
    der = device_certificate(named, CA.issuing, CA.key)
    assert peer_facts(der).device.text == "pump-8"
    uri = b"/device/pump-8"
    with pytest.raises(PeerError):
        peer_facts(der.replace(uri, b"/device/pump-9"))


@given(mutated([DEVICE]))
def test_a_strange_certificate_ends_in_a_refusal_and_nothing_else(der):
    with suppress(PeerError):
        assert peer_facts(der).device.text
