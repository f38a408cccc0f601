"""Server and client contexts from a policy and a credential."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL, crypto

from provisioning.model.errors import Unusable
from provisioning.tls import bindings
from provisioning.tls.bindings import ffi, lib
from provisioning.tls.policy import FFDHE2048, MODERN, PSK_CLIENT, TlsPolicy
from provisioning.tls.sessions import external_psk_session

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

    from provisioning.tls.bindings import Pointer
    from provisioning.tls.engine import Engine

_PSK_SERVER = "unsigned int(SSL *, const char *, unsigned char *, unsigned int)"
_PSK_FIND = "int(SSL *, const unsigned char *, size_t, SSL_SESSION **)"
_PSK_CLIENT = (
    "unsigned int(SSL *, const char *, char *, unsigned int, unsigned char *, "
    "unsigned int)"
)
_PSK_USE = (
    "int(SSL *, const EVP_MD *, const unsigned char **, size_t *, SSL_SESSION **)"
)
_ALPN = (
    "int(SSL *, const unsigned char **, unsigned char *, const unsigned char *, "
    "unsigned int, void *)"
)


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """What a client proves itself by: chain (leaf first) and key, both PEM."""

    chain_pem: bytes
    key_pem: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ClientPsk:
    """A PSK identity and its key of 32 octets."""

    identity: str
    key: bytes = field(repr=False)


class _Context:
    """What both sides share: an SSL_CTX, its engines, its scratch buffer."""

    def __init__(self, policy: TlsPolicy) -> None:
        bindings.probe()
        self.policy = policy
        self._public = SSL.Context(SSL.TLS_METHOD)
        self.pointer = bindings.context_pointer(self._public)
        self.scratch = bindings.scratch_buffer()
        self.engines: dict[int, Engine] = {}
        self._kept: list[object] = []
        self._public.set_min_proto_version(SSL.TLS1_2_VERSION)
        self._public.set_options(
            SSL.OP_NO_COMPRESSION
            | SSL.OP_NO_RENEGOTIATION
            | SSL.OP_CIPHER_SERVER_PREFERENCE
        )
        self._public.set_mode(lib.SSL_MODE_RELEASE_BUFFERS)
        # Sessions live in tickets; the internal cache leaks 1 to 10 KB each (FACTS).
        self._public.set_session_cache_mode(lib.SSL_SESS_CACHE_OFF)
        self._public.set_cipher_list(":".join(policy.suites12).encode())
        self._public.set_tls13_ciphersuites(":".join(policy.suites13).encode())
        if lib.SSL_CTX_set1_curves_list(self.pointer, ":".join(policy.groups).encode()):
            return
        raise Unusable("the TLS policy", f"{policy.name}: {bindings.drain_errors()}")

    def _use(self, chain_pem: bytes, key: PrivateKeyTypes) -> None:
        leaf, *rest = x509.load_pem_x509_certificates(chain_pem)
        self._public.use_certificate(leaf)
        for certificate in rest:
            self._public.add_extra_chain_cert(certificate)
        try:
            self._public.use_privatekey(key)  # type: ignore[arg-type] # pyOpenSSL takes those of cryptography
            self._public.check_privatekey()
        except SSL.Error as error:
            raise Unusable("the TLS key", "it does not fit its certificate") from error

    def _trust(self, anchors: Sequence[x509.Certificate]) -> None:
        store = self._public.get_cert_store()
        if store is None:
            raise Unusable("the OpenSSL binding", "a context has no certificate store")
        for anchor in anchors:
            store.add_cert(crypto.X509.from_cryptography(anchor))

    def _keep(self, signature: str, function: Callable[..., object]) -> Pointer:
        pointer = bindings.callback(signature, function)
        self._kept.append(pointer)
        return pointer


class ServerContext(_Context):
    """What a listener's handshakes start from.

    client_anchors: root, and the CAs under it that devices' certificates come from,
    so that a device need send its leaf only. Expiry is not judged here but in words
    (DESIGN: TLS proves the key, the answer explains).
    staple: the OCSP response of the moment for our certificate, or None.
    """

    def __init__(  # noqa: PLR0913 - a context is these
        self,
        *,
        chain_pem: bytes,
        key_pem: bytes,
        client_anchors: Sequence[x509.Certificate],
        alpn: bytes,
        staple: Callable[[], bytes | None],
        policy: TlsPolicy = MODERN,
    ) -> None:
        super().__init__(policy)
        self._staple = staple
        self._alpn = alpn
        self._use(chain_pem, load_pem_private_key(key_pem, None))
        self._trust(client_anchors)
        # All of the store is ours, so a chain ends at the CA that issued the leaf: the
        # root's signature on that CA need not be verified in every handshake.
        lib.X509_STORE_set_flags(
            lib.SSL_CTX_get_cert_store(self.pointer),
            bindings.NO_CHECK_TIME | bindings.PARTIAL_CHAIN,
        )
        for anchor in client_anchors:
            self._public.add_client_ca(anchor)
        lib.SSL_CTX_set_verify(self.pointer, lib.SSL_VERIFY_PEER, ffi.NULL)
        self._public.set_session_id(b"birthmark")
        lib.SSL_CTX_set_timeout(self.pointer, policy.ticket_lifetime_s)
        bindings.use_dh_parameters(self.pointer, FFDHE2048)
        lib.SSL_CTX_set_psk_server_callback(
            self.pointer, self._keep(_PSK_SERVER, self._psk12)
        )
        lib.SSL_CTX_set_psk_find_session_callback(
            self.pointer, self._keep(_PSK_FIND, self._psk13)
        )
        lib.SSL_CTX_set_tlsext_status_cb(
            self.pointer, self._keep("int(SSL *, void *)", self._on_status)
        )
        lib.SSL_CTX_set_alpn_select_cb(
            self.pointer, self._keep(_ALPN, self._on_alpn), ffi.NULL
        )

    def _psk12(self, ssl: Pointer, name: Pointer, out: Pointer, limit: int) -> int:
        """TLS 1.2's question; 0 sends `unknown_psk_identity`."""
        engine = self.engines.get(bindings.key_of(ssl))
        if engine is None or name == ffi.NULL:
            return 0
        if engine.speaks_13:
            # TLS 1.3 asks here too, tickets included (FACTS); `_psk13` has answered.
            return 0
        octets = ffi.string(name)
        key = engine.key_asked_for(octets)
        if key is None:
            return bindings.INTERNAL_ERROR if engine.is_away(octets) else 0
        if len(key) > limit:
            return 0
        ffi.memmove(out, key, len(key))
        return len(key)

    def _psk13(self, ssl: Pointer, name: Pointer, size: int, out: Pointer) -> int:
        """TLS 1.3's question, for every identity of the ClientHello, tickets too."""
        out[0] = ffi.NULL
        engine = self.engines.get(bindings.key_of(ssl))
        if engine is None:
            return 1
        identity = bytes(ffi.buffer(name, size))
        engine.speaks_13 = True
        key = engine.key_asked_for(identity)
        if key is None:
            # "Not mine" lets tickets and certificates have their turn; 0 is an alert,
            # and only for the identity whose key is away: a ticket needs no HSM.
            return 0 if engine.is_away(identity) else 1
        session = bindings.read_session(external_psk_session(identity, key, engine.now))
        if session is None:
            return 0
        out[0] = session
        return 1

    def _on_status(self, ssl: Pointer, _: Pointer) -> int:
        staple = self._staple()
        if staple is None:
            return int(lib.SSL_TLSEXT_ERR_NOACK)
        bindings.give_staple(ssl, staple)
        return int(lib.SSL_TLSEXT_ERR_OK)

    def _on_alpn(
        self,
        _ssl: Pointer,
        out: Pointer,
        out_size: Pointer,
        offered: Pointer,
        size: int,
        _arg: Pointer,
    ) -> int:
        at = 0
        while at < size:
            length = offered[at]
            name = bytes(ffi.buffer(offered + at + 1, min(length, size - at - 1)))
            if name == self._alpn:
                out[0] = offered + at + 1
                out_size[0] = length
                return int(lib.SSL_TLSEXT_ERR_OK)
            at += 1 + length
        # RFC 7301, 3.2: nothing in common is `no_application_protocol`.
        return int(lib.SSL_TLSEXT_ERR_ALERT_FATAL)


class ClientContext(_Context):
    """What the agent's connections start from.

    anchors_pem: None leaves the server unverified: only to fetch `cacerts` by pin,
    never with a secret. verify_at: the time to judge certificates at; None is now.
    """

    def __init__(  # noqa: PLR0913 - a context is these
        self,
        *,
        anchors_pem: bytes | None,
        credential: ClientCertificate | ClientPsk | None = None,
        alpn: tuple[bytes, ...] = (),
        policy: TlsPolicy = MODERN,
        verify_at: datetime | None = None,
        ask_staple: bool = True,
    ) -> None:
        psk = credential if isinstance(credential, ClientPsk) else None
        super().__init__(PSK_CLIENT if psk and policy is MODERN else policy)
        self.verified = anchors_pem is not None
        self.verify_at = verify_at
        self.ask_staple = ask_staple
        self.psk = psk
        if anchors_pem is not None:
            self._trust(x509.load_pem_x509_certificates(anchors_pem))
        lib.SSL_CTX_set_verify(
            self.pointer,
            lib.SSL_VERIFY_PEER if self.verified else lib.SSL_VERIFY_NONE,
            ffi.NULL,
        )
        if isinstance(credential, ClientCertificate):
            self._use(
                credential.chain_pem, load_pem_private_key(credential.key_pem, None)
            )
        if alpn:
            wire = b"".join(bytes((len(name),)) + name for name in alpn)
            lib.SSL_CTX_set_alpn_protos(self.pointer, wire, len(wire))
        if psk is not None:
            self._psk_name = ffi.new("unsigned char[]", psk.identity.encode())
            lib.SSL_CTX_set_psk_client_callback(
                self.pointer, self._keep(_PSK_CLIENT, self._psk12)
            )
            lib.SSL_CTX_set_psk_use_session_callback(
                self.pointer, self._keep(_PSK_USE, self._psk13)
            )

    def _psk12(
        self,
        _ssl: Pointer,
        _hint: Pointer,
        name: Pointer,
        name_limit: int,
        out: Pointer,
        limit: int,
    ) -> int:
        if self.psk is None:
            return 0
        identity = self.psk.identity.encode() + b"\0"
        if len(identity) > name_limit or len(self.psk.key) > limit:
            return 0
        ffi.memmove(name, identity, len(identity))
        ffi.memmove(out, self.psk.key, len(self.psk.key))
        return len(self.psk.key)

    def _psk13(
        self, ssl: Pointer, _md: Pointer, name: Pointer, size: Pointer, out: Pointer
    ) -> int:
        out[0] = ffi.NULL
        engine = self.engines.get(bindings.key_of(ssl))
        if self.psk is None or engine is None:
            return 1
        identity = self.psk.identity.encode()
        session = bindings.read_session(
            external_psk_session(identity, self.psk.key, engine.now)
        )
        if session is None:
            return 0
        name[0], size[0], out[0] = self._psk_name, len(identity), session
        return 1
