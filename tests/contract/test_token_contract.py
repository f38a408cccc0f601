"""What every token must do: SoftHSM, SoftHSM behind p11-kit, and the fault injector."""

from __future__ import annotations

import asyncio
import copy
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.x509 import ocsp
from pkcs11 import Attribute

from hsm_sim.faults import Faults, open_faulty_token
from hsm_sim.served import ServedToken
from hsm_sim.tokens import make_token
from provisioning.hsm.pkcs11 import Pkcs11Token, open_token
from provisioning.model.errors import Unavailable, Unusable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

ECDSA = ec.ECDSA(hashes.SHA256())
NAME = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a CA")])
NOW = datetime(2025, 1, 1, tzinfo=UTC)


@pytest.fixture(params=["softhsm", "served", "faulty"])
async def reopen(request, tmp_path: Path) -> AsyncIterator:
    """Opens the one token of this test, however often."""
    config = make_token(tmp_path / "hsm")
    async with AsyncExitStack() as stack:
        if request.param == "served":
            config = stack.enter_context(ServedToken(config)).config

        async def open_it() -> Pkcs11Token:
            if request.param == "faulty":
                token = await open_faulty_token(config, Faults())
            else:
                token = await open_token(config)
            stack.push_async_callback(token.close)
            return token

        yield open_it


@pytest.fixture
async def token(reopen) -> Pkcs11Token:
    return await reopen()


def certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    return (
        x509.CertificateBuilder()
        .subject_name(NAME)
        .issuer_name(NAME)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )


async def test_a_signature_verifies_under_the_public_key(token):
    public = await token.make_ec_key("issuing")
    signature = await token.use("issuing", lambda key: key.sign(b"data", ECDSA))
    public.verify(signature, b"data", ECDSA)
    assert await token.public_key("issuing") == public
    assert isinstance(public.curve, ec.SECP256R1)


async def test_cryptographys_builders_take_the_key(token):
    public = await token.make_ec_key("issuing")
    made = await token.use("issuing", certificate)
    made.verify_directly_issued_by(made)

    def csr(key):
        builder = x509.CertificateSigningRequestBuilder().subject_name(NAME)
        return builder.sign(key, hashes.SHA256())

    def crl(key):
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(NAME)
            .last_update(NOW)
            .next_update(NOW + timedelta(days=7))
        )
        return builder.sign(key, hashes.SHA256())

    def answer(key):
        builder = ocsp.OCSPResponseBuilder().add_response(
            made,
            made,
            hashes.SHA256(),
            ocsp.OCSPCertStatus.GOOD,
            NOW,
            NOW + timedelta(days=1),
            None,
            None,
        )
        return builder.responder_id(ocsp.OCSPResponderEncoding.HASH, made).sign(
            key, hashes.SHA256()
        )

    assert (await token.use("issuing", csr)).is_signature_valid
    assert (await token.use("issuing", crl)).is_signature_valid(public)
    response = await token.use("issuing", answer)
    public.verify(response.signature, response.tbs_response_bytes, ECDSA)


async def test_hmac_is_the_same_for_the_same_message_and_no_other(token):
    await token.make_hmac_key("psk-master")
    first, again, other = await asyncio.gather(
        token.hmac("psk-master", b"pump-7"),
        token.hmac("psk-master", b"pump-7"),
        token.hmac("psk-master", b"pump-8"),
    )
    assert first == again != other
    assert len(first) == 32


async def test_keys_and_secrets_outlive_the_session(reopen):
    token = await reopen()
    public = await token.make_ec_key("issuing")
    await token.make_hmac_key("psk-master")
    derived = await token.hmac("psk-master", b"pump-7")
    await token.close()
    token = await reopen()
    assert await token.public_key("issuing") == public
    assert await token.hmac("psk-master", b"pump-7") == derived
    await token.check(["issuing"], ["psk-master"])


async def test_callers_that_wait_together_get_their_own_answers(token):
    await token.make_hmac_key("psk-master")
    public = await token.make_ec_key("issuing")
    messages = [b"%d" % number for number in range(300)]
    derived = await asyncio.gather(*(token.hmac("psk-master", m) for m in messages))
    assert len(set(derived)) == len(messages)
    assert derived[17] == await token.hmac("psk-master", b"17")
    signatures = await asyncio.gather(
        *(token.use("issuing", lambda key, m=m: key.sign(m, ECDSA)) for m in messages)
    )
    for message, signature in zip(messages, signatures, strict=True):
        public.verify(signature, message, ECDSA)


async def test_a_key_is_made_once_under_its_label(token):
    public = await token.make_ec_key("issuing")
    await token.make_hmac_key("psk-master")
    with pytest.raises(Unusable, match="'issuing' already"):
        await token.make_ec_key("issuing")
    with pytest.raises(Unusable, match="'psk-master' already"):
        await token.make_hmac_key("psk-master")
    assert await token.public_key("issuing") == public


async def test_a_label_that_the_token_lacks_is_named(token):
    with pytest.raises(Unusable, match="no private key labelled 'factory'"):
        await token.use("factory", lambda key: key.sign(b"", ECDSA))
    with pytest.raises(Unusable, match="no secret key labelled 'psk-master'"):
        await token.hmac("psk-master", b"")


async def test_made_keys_pass_the_check(token):
    await token.make_ec_key("issuing")
    await token.make_hmac_key("psk-master")
    await token.check(["issuing"], ["psk-master"])


async def test_a_new_key_has_the_identifier_of_its_certificate(token):
    public = await token.make_ec_key("issuing")
    wanted = x509.SubjectKeyIdentifier.from_public_key(public).digest
    assert await ids(token, "issuing") == {wanted}
    await token.set_id("issuing", b"another")
    assert await ids(token, "issuing") == {b"another"}


async def ids(token: Pkcs11Token, label: str) -> set[bytes]:
    """CKA_ID of both halves, by the token's own thread."""
    return await token._submit(
        "the IDs",
        lambda ring: {
            ring.pair(label).private[Attribute.ID],
            ring.pair(label).public[Attribute.ID],
        },
    )


async def test_the_private_key_cannot_be_had(token):
    await token.make_ec_key("issuing")

    def try_it(key):
        for attempt in (
            key.private_numbers,
            lambda: key.private_bytes(
                serialization.Encoding.DER,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
            lambda: key.exchange(ec.ECDH(), key.public_key()),
        ):
            with pytest.raises(UnsupportedAlgorithm):
                attempt()
        return repr(key)

    assert "PRIVATE" not in await token.use("issuing", try_it)


async def test_only_ecdsa_with_sha256_is_signed(token):
    await token.make_ec_key("issuing")
    for algorithm in (
        ec.ECDSA(hashes.SHA1()),  # noqa: S303 - that is the point
        ec.ECDSA(hashes.SHA384()),
        ec.ECDSA(utils.Prehashed(hashes.SHA256())),
    ):
        with pytest.raises(UnsupportedAlgorithm):
            await token.use("issuing", lambda key, a=algorithm: key.sign(b"x" * 32, a))


async def test_copies_of_a_key_are_the_key(token):
    await token.make_ec_key("issuing")

    def same(key):
        return copy.copy(key) is key and copy.deepcopy(key) is key

    assert await token.use("issuing", same)


async def test_what_the_work_raises_reaches_its_caller_alone(token):
    await token.make_ec_key("issuing")

    def fail(_key):
        raise LookupError("a bug in the work")

    good = token.use("issuing", lambda key: key.sign(b"data", ECDSA))
    bad, signature = await asyncio.gather(
        token.use("issuing", fail), good, return_exceptions=True
    )
    assert isinstance(bad, LookupError)
    assert isinstance(signature, bytes)


async def test_a_key_does_not_work_outside_of_its_work(token):
    await token.make_ec_key("issuing")
    smuggled = await token.use("issuing", lambda key: key)
    with pytest.raises(RuntimeError, match="token's thread"):
        smuggled.sign(b"data", ECDSA)


async def test_a_caller_that_goes_away_hurts_nobody(token):
    await token.make_hmac_key("psk-master")
    calls = [asyncio.create_task(token.hmac("psk-master", b"x")) for _ in range(50)]
    await asyncio.sleep(0)
    for call in calls[::2]:
        call.cancel()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(r, asyncio.CancelledError) for r in results[::2])
    assert len(set(results[1::2])) == 1


async def test_a_closed_token_is_away(reopen):
    token = await reopen()
    await token.close()
    await token.close()
    with pytest.raises(Unavailable):
        await token.hmac("psk-master", b"x")


async def test_what_waits_while_the_token_is_closed_is_told(reopen):
    token = await reopen()
    await token.make_hmac_key("psk-master")
    calls = [asyncio.create_task(token.hmac("psk-master", b"x")) for _ in range(500)]
    await asyncio.sleep(0)
    await token.close()
    for result in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(result, bytes | Unavailable)


async def test_one_process_has_a_module_open_once(reopen):
    await reopen()
    with pytest.raises(RuntimeError, match="owner in this process"):
        await reopen()
