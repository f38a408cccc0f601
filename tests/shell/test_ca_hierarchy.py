"""The CA's birth and upkeep: made once, whatever interrupts it."""

from __future__ import annotations

import secrets
from dataclasses import replace
from datetime import timedelta

import pytest
from ca_house import DAY, Breakable, Clock
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from hsm_sim.tokens import make_token
from provisioning import config
from provisioning.ca.hierarchy import (
    ISSUING_LIFETIME,
    load_hierarchy,
    make_hierarchy,
    make_hmac_key,
)
from provisioning.ca.renew import (
    chain_path,
    key_path,
    load_own,
    make_responder_key,
    renew_own,
)
from provisioning.ca.settings import CAS
from provisioning.hsm.pkcs11 import open_token
from provisioning.model.errors import OutcomeUnknown, Unavailable, Unusable
from provisioning.psk.derive import PSK_MASTER


@pytest.fixture
def settings(tmp_path):
    text = config.default_toml(
        org="Test", domain="test.example", hosts=("gw.test", "::1"), module="unused"
    )
    return config.parse(text, tmp_path).ca


@pytest.fixture
async def token(tmp_path):
    opened = Breakable(await open_token(make_token(tmp_path / "hsm")))
    yield opened
    await opened.close()


@pytest.fixture
def clock():
    return Clock()


async def init(token, settings, clock):
    """What `birthmark init` does of the CA."""
    hierarchy = await make_hierarchy(token, settings, clock(), secrets.token_bytes)
    await make_responder_key(token)
    await make_hmac_key(token, PSK_MASTER)
    own = await renew_own(token, settings, hierarchy, clock(), secrets.token_bytes)
    return hierarchy, own


async def renewed(token, settings, hierarchy, clock):
    return await renew_own(token, settings, hierarchy, clock(), secrets.token_bytes)


async def test_root_and_factory_have_no_end_and_issuing_has(token, settings, clock):
    hierarchy, _ = await init(token, settings, clock)
    root, factory, issuing = (hierarchy.issuers[name].certificate for name in CAS)
    assert root.not_valid_after_utc.year == factory.not_valid_after_utc.year == 9999
    assert issuing.not_valid_after_utc == clock() + ISSUING_LIFETIME
    for below in (root, factory, issuing):
        below.verify_directly_issued_by(root)
    for ca, path_length in ((root, None), (factory, 0), (issuing, 0)):
        found = ca.extensions.get_extension_for_class(x509.BasicConstraints)
        assert (found.critical, found.value.ca) == (True, True)
        assert found.value.path_length == path_length


async def test_keys_stay_in_the_token_and_are_named_by_their_certificates(
    token, settings, clock
):
    await init(token, settings, clock)
    await token.check([*CAS, "ocsp"], [PSK_MASTER])
    for name in CAS:
        found = x509.load_der_x509_certificate(
            settings.certificate_path(name).read_bytes()
        )
        assert found.public_key() == await token.public_key(name)


async def test_init_again_changes_nothing(token, settings, clock):
    first = await init(token, settings, clock)
    before = {path: path.read_bytes() for path in settings.public.rglob("*.crt")}
    clock.now += DAY
    again = await init(token, settings, clock)
    assert again[0].certificates == first[0].certificates
    assert again[1] == first[1]
    assert before == {p: p.read_bytes() for p in settings.public.rglob("*.crt")}
    assert load_hierarchy(settings).certificates == first[0].certificates


@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("call", ["make_ec_key", "use", "set_id", "make_hmac_key"])
async def test_an_init_that_is_cut_off_anywhere_is_completed_by_the_next(
    token, settings, clock, call, how
):
    """Each call to the token fails once, at its first, second, third … use."""
    done = None
    for skip in range(12):
        token.lose[call] = [""] * skip + [how]
        try:
            done = await init(token, settings, clock)
        except (Unavailable, OutcomeUnknown):
            continue
        if token.lose[call]:
            break
    assert done is not None
    token.lose.clear()
    assert (await init(token, settings, clock))[0].certificates == done[0].certificates
    for name in ("factory", "issuing"):
        certificate = done[0].issuers[name].certificate
        certificate.verify_directly_issued_by(done[0].issuers["root"].certificate)


async def test_another_tokens_certificates_are_refused(
    token, settings, clock, tmp_path
):
    await init(token, settings, clock)
    path = settings.certificate_path("issuing")
    path.write_bytes(settings.certificate_path("factory").read_bytes())
    with pytest.raises(Unusable, match="issuing"):
        await make_hierarchy(token, settings, clock(), secrets.token_bytes)


async def test_what_is_missing_or_broken_is_named_with_the_cure(token, settings, clock):
    with pytest.raises(Unusable, match="birthmark init"):
        load_hierarchy(settings)
    await init(token, settings, clock)
    path = settings.certificate_path("factory")
    path.write_bytes(b"nonsense")
    with pytest.raises(Unusable, match="factory"):
        load_hierarchy(settings)


async def test_files_have_the_modes_of_the_design(token, settings, clock):
    await init(token, settings, clock)
    modes = {
        path.relative_to(settings.folder).as_posix(): path.stat().st_mode & 0o777
        for path in settings.folder.rglob("*")
        if "hsm" not in path.parts
    }
    assert modes["public"] == modes["public/ca"] == 0o755
    assert modes["public/ca/root.crt"] == 0o644
    assert modes["server"] == 0o700
    assert modes["server/key.pem"] == modes["server/chain.pem"] == 0o600
    assert not [name for name in modes if "new-" in name]


async def test_the_server_certificate_names_its_hosts_and_lives_90_days_at_most(
    token, settings, clock
):
    _, own = await init(token, settings, clock)
    leaf = own.server_certificate
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["gw.test"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["::1"]
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc <= timedelta(days=90)
    chain = x509.load_pem_x509_certificates(own.server_chain_pem)
    assert len(chain) == 2, "the root is the client's to have"
    chain[0].verify_directly_issued_by(chain[1])
    assert load_pem_private_key(own.server_key_pem, None).public_key() == (
        leaf.public_key()
    )
    assert b"PRIVATE" not in repr(own).encode()


async def test_each_ca_has_a_responder_of_its_own_with_the_one_key(
    token, settings, clock
):
    hierarchy, own = await init(token, settings, clock)
    key = await token.public_key("ocsp")
    for name in CAS:
        found = x509.load_der_x509_certificate(own.responders[name])
        found.verify_directly_issued_by(hierarchy.issuers[name].certificate)
        assert found.public_key() == key
        uses = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(uses) == [ExtendedKeyUsageOID.OCSP_SIGNING]


async def test_own_certificates_are_renewed_at_two_thirds_of_their_life(
    token, settings, clock
):
    hierarchy, own = await init(token, settings, clock)
    clock.now += 19 * DAY
    assert await renewed(token, settings, hierarchy, clock) == own, "nothing is due"
    clock.now += 2 * DAY
    second = await renewed(token, settings, hierarchy, clock)
    assert second.responders.keys() == own.responders.keys()
    assert all(second.responders[n] != own.responders[n] for n in CAS)
    assert second.server_chain_pem == own.server_chain_pem
    clock.now += 40 * DAY
    third = await renewed(token, settings, hierarchy, clock)
    assert third.server_chain_pem != own.server_chain_pem
    assert third.server_key_pem == own.server_key_pem
    assert load_own(settings) == third


async def test_new_host_names_give_a_new_server_certificate(token, settings, clock):
    hierarchy, _ = await init(token, settings, clock)
    moved = replace(settings, hosts=("new.test",))
    own = await renewed(token, moved, hierarchy, clock)
    names = own.server_certificate.extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["new.test"]


async def test_a_key_without_its_certificate_gets_one(token, settings, clock):
    """The power went between the two files."""
    hierarchy, own = await init(token, settings, clock)
    chain_path(settings).unlink()
    with pytest.raises(Unusable, match="birthmark init"):
        load_own(settings)
    again = await renewed(token, settings, hierarchy, clock)
    assert again.server_key_pem == own.server_key_pem


async def test_a_certificate_of_another_key_is_replaced(token, settings, clock):
    hierarchy, _ = await init(token, settings, clock)
    key_path(settings).unlink()
    own = await renewed(token, settings, hierarchy, clock)
    assert own.server_certificate.public_key() == (
        load_pem_private_key(key_path(settings).read_bytes(), None).public_key()
    )


async def test_a_token_that_is_away_stops_only_what_is_due(token, settings, clock):
    hierarchy, own = await init(token, settings, clock)
    token.away = True
    assert await renewed(token, settings, hierarchy, clock) == own
    clock.now += 70 * DAY
    with pytest.raises(Unavailable):
        await renewed(token, settings, hierarchy, clock)
