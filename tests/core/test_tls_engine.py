"""The TLS engine in memory: two engines, no sockets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from provisioning.model.credentials import CertificateProof, PskProof
from provisioning.model.ids import PskIdentity
from provisioning.tls import bindings, peek
from provisioning.tls.context import (
    ClientCertificate,
    ClientContext,
    ClientPsk,
    ServerContext,
)
from provisioning.tls.engine import (
    ClientEngine,
    Data,
    Established,
    Failed,
    PeerClosed,
    PskWanted,
    ServerEngine,
)
from provisioning.tls.policy import MODERN, PSK_CLIENT, TlsPolicy
from provisioning.tls.sessions import read_session

NOW = 1_800_000_000
KEY = bytes(range(32))
PUMP = PskIdentity.parse("pump-7#3")


@pytest.fixture(scope="module")
def server_context(authority):
    made = authority.server("gateway.test")
    return ServerContext(
        chain_pem=made.pem,
        key_pem=made.key_pem,
        client_anchors=[authority.root.certificate],
        alpn=b"http/1.1",
        staple=lambda: None,
    )


def only(version: str, policy: TlsPolicy = MODERN) -> TlsPolicy:
    """A policy with the suites of one version."""
    if version == "TLSv1.2":
        return TlsPolicy("12", policy.suites12, (), policy.groups)
    return TlsPolicy("13", policy.suites12, policy.suites13, policy.groups)


class Pair:
    """A client and a server, and every event that each gave."""

    def __init__(self, server, client, *, keys=None, chunk=None, session=None):
        self.server = ServerEngine(server, NOW)
        self.client = ClientEngine(
            client, NOW, server_name="gateway.test", session=session
        )
        self.keys = keys or {}
        self.chunk = chunk
        self.server_events, self.client_events = [], list(self.client.start())
        self.wanted = []

    def run(self):
        for _ in range(30):
            up = self.client.outgoing()
            for piece in self._pieces(up):
                self._at_server(self.server.receive(piece))
            down = self.server.outgoing()
            for piece in self._pieces(down):
                self.client_events += self.client.receive(piece)
            if not up and not down:
                break
        return self

    def _at_server(self, events):
        for event in events:
            if isinstance(event, PskWanted):
                self.wanted.append(event.identity)
                key = self.keys.get(event.identity)
                self._at_server(self.server.provide(event.identity, key))
            else:
                self.server_events.append(event)

    def _pieces(self, data):
        size = self.chunk or max(len(data), 1)
        return [data[at : at + size] for at in range(0, len(data), size)]

    def of(self, kind, side="server"):
        return [e for e in getattr(self, f"{side}_events") if isinstance(e, kind)]


def client_of(authority, credential=None, policy=MODERN, **more):
    return ClientContext(
        anchors_pem=authority.root.pem, credential=credential, policy=policy, **more
    )


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_a_certificate_proves_the_device(authority, server_context, version):
    device = authority.device("pump-7")
    client = client_of(
        authority, ClientCertificate(device.pem, device.key_pem), only(version)
    )
    if version == "TLSv1.2":
        client._public.set_max_proto_version(0x0303)
    pair = Pair(server_context, client).run()
    [seen] = pair.of(Established)
    assert seen.version == version
    assert seen.proof == CertificateProof(device.der)
    assert not seen.resumed
    assert seen.bytes_up > 500
    assert seen.bytes_down > 500


@pytest.mark.parametrize("chunk", [None, 1, 7, 100])
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_a_psk_proves_the_device_however_the_bytes_come(
    authority, server_context, version, chunk
):
    client = client_of(authority, ClientPsk(str(PUMP), KEY))
    if version == "TLSv1.2":
        client._public.set_max_proto_version(0x0303)
    pair = Pair(server_context, client, keys={PUMP: KEY}, chunk=chunk).run()
    [seen] = pair.of(Established)
    assert pair.wanted == [PUMP]
    assert (seen.version, seen.proof, seen.resumed) == (version, PskProof(PUMP), False)
    assert not pair.of(Established, "client")[0].resumed
    pair.client.send(b"hello")
    pair.run()
    assert pair.of(Data) == [Data(b"hello")]


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
@pytest.mark.parametrize("kind", ["certificate", "psk"])
def test_a_resumed_session_is_the_same_device(authority, server_context, version, kind):
    device = authority.device("pump-7")
    credential = (
        ClientCertificate(device.pem, device.key_pem)
        if kind == "certificate"
        else ClientPsk(str(PUMP), KEY)
    )
    client = client_of(authority, credential)
    if version == "TLSv1.2":
        client._public.set_max_proto_version(0x0303)
    first = Pair(server_context, client, keys={PUMP: KEY}).run()
    session = first.client.session()
    assert session is not None
    again = Pair(server_context, client, keys={PUMP: KEY}, session=session).run()
    [seen] = again.of(Established)
    assert seen.resumed
    assert again.of(Established, "client")[0].resumed
    assert seen.proof == first.of(Established)[0].proof
    # And the ticket of a resumed session still says who it is.
    third = Pair(
        server_context, client, keys={PUMP: KEY}, session=again.client.session()
    ).run()
    assert third.of(Established)[0].proof == seen.proof


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_a_wrong_key_ends_the_handshake(authority, server_context, version):
    client = client_of(authority, ClientPsk(str(PUMP), b"\x01" * 32))
    if version == "TLSv1.2":
        client._public.set_max_proto_version(0x0303)
    pair = Pair(server_context, client, keys={PUMP: KEY}).run()
    assert not pair.of(Established)
    assert pair.of(Failed)


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_a_key_that_is_away_gives_internal_error(authority, server_context, version):
    client = client_of(authority, ClientPsk(str(PUMP), KEY))
    if version == "TLSv1.2":
        client._public.set_max_proto_version(0x0303)
    pair = Pair(server_context, client, keys={PUMP: None}).run()
    assert not pair.of(Established)
    assert pair.of(Failed, "client")[0].alert == "internal_error"


def test_an_identity_that_is_not_ours_is_left_to_certificates(
    authority, server_context
):
    client = client_of(authority, ClientPsk("not an identity", KEY))
    pair = Pair(server_context, client).run()
    assert not pair.wanted
    assert [e.proof for e in pair.of(Established)] == [None]


def test_an_unknown_issuer_gets_its_alert(authority, make_authority, server_context):
    stranger = make_authority("Somebody else").device("pump-7")
    client = client_of(authority, ClientCertificate(stranger.pem, stranger.key_pem))
    pair = Pair(server_context, client).run()
    assert pair.of(Failed, "client")[0].alert == "unknown_ca"


def test_an_expired_certificate_is_let_through_to_be_refused_in_words(
    authority, server_context
):
    device = authority.device("pump-7", days=(-10, -5))
    client = client_of(authority, ClientCertificate(device.pem, device.key_pem))
    pair = Pair(server_context, client).run()
    assert pair.of(Established)[0].proof == CertificateProof(device.der)


def test_the_client_refuses_another_name(authority):
    made = authority.server("elsewhere.test")
    server = ServerContext(
        chain_pem=made.pem,
        key_pem=made.key_pem,
        client_anchors=[authority.root.certificate],
        alpn=b"http/1.1",
        staple=lambda: None,
    )
    pair = Pair(server, client_of(authority)).run()
    [failed] = pair.of(Failed, "client")
    assert failed.untrusted


def test_nothing_in_common_by_alpn_is_an_alert(authority, server_context):
    pair = Pair(server_context, client_of(authority, alpn=(b"mqtt",))).run()
    assert pair.of(Failed, "client")[0].alert == "no_application_protocol"


def test_both_sides_export_the_same(authority, server_context):
    pair = Pair(server_context, client_of(authority)).run()
    binding = pair.client.export(b"EXPORTER-Channel-Binding")
    assert binding in pair.server.channel_bindings()
    assert len(binding) == 32


def test_close_notify_is_told(authority, server_context):
    pair = Pair(server_context, client_of(authority)).run()
    pair.client.close()
    pair.run()
    assert pair.of(PeerClosed)


def test_the_binding_probe_names_what_is_missing():
    assert bindings.missing() == []
    assert bindings.missing(frozenset({"SSL_new", "SSL_imaginary"})) == [
        "SSL_imaginary"
    ]


def test_secrets_are_not_in_a_repr(authority):
    made = authority.device("pump-7")
    shown = repr(ClientPsk("pump-7#1", KEY)) + repr(
        ClientCertificate(made.pem, made.key_pem)
    )
    assert KEY.hex() not in shown
    assert repr(KEY) not in shown
    assert "PRIVATE" not in shown


@given(st.binary(max_size=400))
def test_nonsense_never_passes_a_handshake_and_never_raises(
    authority, server_context, data
):
    engine = ServerEngine(server_context, NOW)
    events = engine.receive(data)
    assert not any(isinstance(e, Established) for e in events)
    engine.release()


@settings(max_examples=50)
@given(at=st.integers(0, 10_000), bit=st.integers(0, 7), chunk=st.integers(1, 600))
def test_a_changed_client_hello_does_no_harm(authority, server_context, at, bit, chunk):
    client = ClientEngine(
        client_of(authority, ClientPsk(str(PUMP), KEY)),
        NOW,
        server_name="gateway.test",
    )
    client.start()
    hello = bytearray(client.outgoing())
    hello[at % len(hello)] ^= 1 << bit
    server = ServerEngine(server_context, NOW)
    for start in range(0, len(hello), chunk):
        for event in server.receive(bytes(hello[start : start + chunk])):
            if isinstance(event, PskWanted):
                server.provide(event.identity, KEY)
    assert server.established is None
    server.release()
    client.release()


@given(st.binary(max_size=300))
def test_readers_of_hellos_and_sessions_take_anything(data):
    peek.offered_identities(data)
    peek.key_exchange_identity(data)
    peek.server_choice(data)
    peek.ClearFlight().feed(data)
    read_session(data)


def test_a_long_hello_is_not_kept():
    flight = peek.ClearFlight()
    record = b"\x16\x03\x01\x40\x00" + b"\x01\xff\xff\xff" + b"x" * 16_380
    for _ in range(10):
        flight.feed(record)
    assert flight.over
    assert len(flight._messages) == 0


def test_psk_clients_offer_only_what_their_key_fits():
    assert "TLS_AES_256_GCM_SHA384" not in PSK_CLIENT.suites13
