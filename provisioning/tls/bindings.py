"""The only file that knows pyOpenSSL's private parts; it probes them at start.

pyOpenSSL's public API has no PSK, no stapling per connection on memory BIOs, no session
bytes and no exporter with TLS 1.3; `OpenSSL._util.lib` has them all (FACTS). Every
symbol used is in `NEEDED`, so a build that lacks one is told by name when the process
starts, not by a crash in a handshake.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from OpenSSL import SSL
from OpenSSL import _util as _private

from provisioning.model.errors import Unusable

if TYPE_CHECKING:
    from collections.abc import Callable

# cffi's module object has no stubs: `Any` stays inside this file and engine's pointers.
lib: Any = _private.lib
ffi: Any = _private.ffi

Pointer = Any
"""A cffi pointer: opaque outside this file."""

NEEDED = frozenset(
    [
        "BIO_free",
        "BIO_new",
        "BIO_new_mem_buf",
        "BIO_read",
        "BIO_s_mem",
        "BIO_write",
        "DH_free",
        "ERR_clear_error",
        "ERR_get_error",
        "ERR_reason_error_string",
        "OPENSSL_malloc",
        "PEM_read_bio_DHparams",
        "SSL_CIPHER_find",
        "SSL_CIPHER_get_name",
        "SSL_CTX_get_cert_store",
        "SSL_CTX_set1_curves_list",
        "SSL_CTX_set_alpn_protos",
        "SSL_CTX_set_alpn_select_cb",
        "SSL_CTX_set_cipher_list",
        "SSL_CTX_set_ciphersuites",
        "SSL_CTX_set_psk_client_callback",
        "SSL_CTX_set_psk_find_session_callback",
        "SSL_CTX_set_psk_server_callback",
        "SSL_CTX_set_psk_use_session_callback",
        "SSL_CTX_set_session_cache_mode",
        "SSL_CTX_set_timeout",
        "SSL_CTX_set_tlsext_status_cb",
        "SSL_CTX_set_tmp_dh",
        "SSL_CTX_set_verify",
        "SSL_SESSION_free",
        "SSL_do_handshake",
        "SSL_export_keying_material",
        "SSL_free",
        "SSL_get0_alpn_selected",
        "SSL_get0_group_name",
        "SSL_get0_param",
        "SSL_get1_session",
        "SSL_get_current_cipher",
        "SSL_get_error",
        "SSL_get_extms_support",
        "SSL_get_finished",
        "SSL_get_peer_cert_chain",
        "SSL_get_peer_certificate",
        "SSL_get_peer_finished",
        "SSL_get_session",
        "SSL_get_tlsext_status_ocsp_resp",
        "SSL_get_verify_result",
        "SSL_get_version",
        "SSL_new",
        "SSL_read",
        "SSL_session_reused",
        "SSL_set_accept_state",
        "SSL_set_alpn_protos",
        "SSL_set_bio",
        "SSL_set_connect_state",
        "SSL_set_session",
        "SSL_set_tlsext_host_name",
        "SSL_set_tlsext_status_ocsp_resp",
        "SSL_set_tlsext_status_type",
        "SSL_shutdown",
        "SSL_write",
        "X509_STORE_set_flags",
        "X509_VERIFY_PARAM_set1_host",
        "X509_VERIFY_PARAM_set1_ip",
        "X509_VERIFY_PARAM_set_time",
        "X509_free",
        "X509_verify_cert_error_string",
        "d2i_SSL_SESSION",
        "i2d_SSL_SESSION",
        "i2d_X509_bio",
        "sk_X509_num",
        "sk_X509_value",
        "SSL_ERROR_NONE",
        "SSL_ERROR_SSL",
        "SSL_ERROR_SYSCALL",
        "SSL_ERROR_WANT_READ",
        "SSL_ERROR_WANT_WRITE",
        "SSL_ERROR_ZERO_RETURN",
        "SSL_MODE_RELEASE_BUFFERS",
        "SSL_SESS_CACHE_OFF",
        "SSL_TLSEXT_ERR_ALERT_FATAL",
        "SSL_TLSEXT_ERR_NOACK",
        "SSL_TLSEXT_ERR_OK",
        "SSL_VERIFY_NONE",
        "SSL_VERIFY_PEER",
    ]
)

# Values of OpenSSL's headers that the bindings leave out.
NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME: a server lets expiry through, to refuse it in words."""

PARTIAL_CHAIN = 0x80000
"""X509_V_FLAG_PARTIAL_CHAIN: a chain may end at any certificate of the store."""

STATUS_TYPE_OCSP = 1
SCRATCH = 32_768
"""Octets moved between OpenSSL and Python at a time: two full records."""

INTERNAL_ERROR = 0xFFFF
"""A PSK length no key has: OpenSSL answers it with the alert `internal_error`."""


def missing(symbols: frozenset[str] = NEEDED) -> list[str]:
    """Names that this build of the bindings lacks, sorted."""
    return sorted(name for name in symbols if not hasattr(lib, name))


def probe() -> str:
    """OpenSSL's version; raises Unusable that names every missing symbol."""
    lacking = missing()
    if lacking:
        raise Unusable(
            "the OpenSSL binding",
            f"it lacks {', '.join(lacking)}; install the cryptography and pyOpenSSL "
            "versions of requirements.lock",
        )
    return SSL.SSLeay_version(SSL.SSLEAY_VERSION).decode()


def context_pointer(context: SSL.Context) -> Pointer:
    """The SSL_CTX of a pyOpenSSL context, which must outlive the pointer."""
    return context._context  # noqa: SLF001 - the point of this file


def key_of(ssl: Pointer) -> int:
    """What tells SSL objects apart in a callback."""
    return int(ffi.cast("uintptr_t", ssl))


def callback(signature: str, function: Callable[..., object]) -> Pointer:
    """A C callback; whoever registers it keeps it alive (FACTS)."""
    return ffi.callback(signature, function)


def scratch_buffer() -> Pointer:
    """One buffer for a context's engines: they all run on one thread."""
    return ffi.new("char[]", SCRATCH)


def drain_errors() -> str:
    """OpenSSL's newest reason in its own words; the error queue is empty after."""
    reason = ""
    while code := lib.ERR_get_error():
        text = lib.ERR_reason_error_string(code)
        if text != ffi.NULL:
            reason = ffi.string(text).decode("ascii", "replace")
    return reason


def new_ssl(context: Pointer, *, server: bool) -> tuple[Pointer, Pointer, Pointer]:
    """A connection over two memory BIOs: (SSL, incoming, outgoing), freed by itself."""
    ssl = lib.SSL_new(context)
    if ssl == ffi.NULL:
        raise MemoryError
    ssl = ffi.gc(ssl, lib.SSL_free)
    incoming, outgoing = lib.BIO_new(lib.BIO_s_mem()), lib.BIO_new(lib.BIO_s_mem())
    # SSL_set_bio takes over both: SSL_free frees them.
    lib.SSL_set_bio(ssl, incoming, outgoing)
    if server:
        lib.SSL_set_accept_state(ssl)
    else:
        lib.SSL_set_connect_state(ssl)
    return ssl, incoming, outgoing


def certificate_der(x509: Pointer) -> bytes:
    """The DER of an X509 object."""
    bio = ffi.gc(lib.BIO_new(lib.BIO_s_mem()), lib.BIO_free)
    lib.i2d_X509_bio(bio, x509)
    found = b""
    buffer = ffi.new("char[]", 4_096)
    while (size := lib.BIO_read(bio, buffer, 4_096)) > 0:
        found += ffi.buffer(buffer, size)[:]
    return found


def peer_certificate(ssl: Pointer) -> bytes | None:
    """The peer's leaf, from a resumed session as well."""
    x509 = lib.SSL_get_peer_certificate(ssl)
    if x509 == ffi.NULL:
        return None
    x509 = ffi.gc(x509, lib.X509_free)
    return certificate_der(x509)


def peer_chain(ssl: Pointer) -> tuple[bytes, ...]:
    """What the server sent; empty in a resumed session."""
    stack = lib.SSL_get_peer_cert_chain(ssl)
    if stack == ffi.NULL:
        return ()
    count = lib.sk_X509_num(stack)
    return tuple(certificate_der(lib.sk_X509_value(stack, n)) for n in range(count))


def session_der(ssl: Pointer) -> bytes:
    """The current session's serialisation; empty where there is none."""
    session = lib.SSL_get_session(ssl)
    if session == ffi.NULL:
        return b""
    size = lib.i2d_SSL_SESSION(session, ffi.NULL)
    if size <= 0:
        return b""
    buffer = ffi.new("unsigned char[]", size)
    lib.i2d_SSL_SESSION(session, ffi.new("unsigned char **", buffer))
    return bytes(ffi.buffer(buffer, size))


def read_session(der: bytes) -> Pointer | None:
    """An SSL_SESSION that the caller owns, or None."""
    octets = ffi.new("unsigned char[]", der)
    session = lib.d2i_SSL_SESSION(
        ffi.NULL, ffi.new("const unsigned char **", octets), len(der)
    )
    if session == ffi.NULL:
        lib.ERR_clear_error()
        return None
    return session


def set_session(ssl: Pointer, der: bytes) -> bool:
    """Offer this session for resumption; false if it is not one."""
    session = read_session(der)
    if session is None:
        return False
    session = ffi.gc(session, lib.SSL_SESSION_free)
    return bool(lib.SSL_set_session(ssl, session) == 1)


def give_staple(ssl: Pointer, staple: bytes) -> None:
    """Send this OCSP response; OpenSSL frees the copy."""
    copy = lib.OPENSSL_malloc(len(staple))
    ffi.memmove(copy, staple, len(staple))
    lib.SSL_set_tlsext_status_ocsp_resp(ssl, copy, len(staple))


def received_staple(ssl: Pointer) -> bytes | None:
    """The OCSP response that the server stapled."""
    pointer = ffi.new("unsigned char **")
    size = lib.SSL_get_tlsext_status_ocsp_resp(ssl, pointer)
    return bytes(ffi.buffer(pointer[0], size)) if size > 0 else None


def alpn(ssl: Pointer) -> bytes | None:
    """The protocol that was agreed on."""
    pointer, size = ffi.new("const unsigned char **"), ffi.new("unsigned int *")
    lib.SSL_get0_alpn_selected(ssl, pointer, size)
    return bytes(ffi.buffer(pointer[0], size[0])) if size[0] else None


def text(pointer: Pointer) -> str:
    """A C string."""
    return "" if pointer == ffi.NULL else ffi.string(pointer).decode("ascii", "replace")


def cipher_and_group(ssl: Pointer) -> tuple[str, str | None]:
    """OpenSSL's names of the suite and of the key exchange group, if there was one."""
    cipher = lib.SSL_CIPHER_get_name(lib.SSL_get_current_cipher(ssl))
    group = lib.SSL_get0_group_name(ssl)
    return text(cipher), text(group) or None


def verify_error(ssl: Pointer) -> str | None:
    """Why the peer's chain was not accepted; None if it was."""
    code = lib.SSL_get_verify_result(ssl)
    return text(lib.X509_verify_cert_error_string(code)) if code else None


def export_keying_material(ssl: Pointer, label: bytes, length: int) -> bytes:
    """The exporter of RFC 5705 and RFC 8446, 7.5, without a context value."""
    out = ffi.new("unsigned char[]", length)
    done = lib.SSL_export_keying_material(
        ssl, out, length, label, len(label), ffi.NULL, 0, 0
    )
    if done != 1:
        drain_errors()
        raise ValueError
    return bytes(ffi.buffer(out, length))


def tls_unique(ssl: Pointer, *, client_first: bool) -> bytes:
    """The first Finished message (RFC 5929, 3.1): the client's, or on resumption ours.

    Seen from the server.
    """
    buffer = ffi.new("char[]", 64)
    get = lib.SSL_get_peer_finished if client_first else lib.SSL_get_finished
    return bytes(ffi.buffer(buffer, get(ssl, buffer, 64)))


def expect_server(ssl: Pointer, name: str, address: bytes | None) -> None:
    """Verify the server as this name, or as this packed IP address (RFC 9525)."""
    param = lib.SSL_get0_param(ssl)
    if address is not None:
        lib.X509_VERIFY_PARAM_set1_ip(param, address, len(address))
    else:
        encoded = name.encode("idna")
        lib.X509_VERIFY_PARAM_set1_host(param, encoded, len(encoded))
        lib.SSL_set_tlsext_host_name(ssl, encoded)


def verify_as_of(ssl: Pointer, seconds: int) -> None:
    """Judge validity periods at this time, in seconds since 1970."""
    lib.X509_VERIFY_PARAM_set_time(lib.SSL_get0_param(ssl), seconds)


def use_dh_parameters(context: Pointer, pem: bytes) -> None:
    """Without parameters DHE-PSK fails with Debian's s_client (FACTS)."""
    bio = ffi.gc(lib.BIO_new_mem_buf(pem, len(pem)), lib.BIO_free)
    dh = lib.PEM_read_bio_DHparams(bio, ffi.NULL, ffi.NULL, ffi.NULL)
    dh = ffi.gc(dh, lib.DH_free)
    if lib.SSL_CTX_set_tmp_dh(context, dh) != 1:
        raise Unusable("the OpenSSL binding", drain_errors())
