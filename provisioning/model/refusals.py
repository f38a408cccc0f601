"""The refusal table: for each reason its code, its answers, and one sentence.

One truth for HTTP (RFC 9457), CoAP, MQTT 3.1.1 and MQTT 5, read by code, tests and
documentation alike. A sentence says who must do what.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reason to refuse.

    http: status. coap: code as RFC 7252 writes it. mqtt311: CONNACK return code.
    mqtt5: reason code. retryable: the same request can succeed later, unchanged.
    """

    code: str
    http: int
    coap: str
    mqtt311: int
    mqtt5: int
    retryable: bool
    sentence: str


TABLE: dict[str, Refusal] = {}


def _row(  # noqa: PLR0913 - the columns of the table
    code: str,
    http: int,
    coap: str,
    mqtt: tuple[int, int],
    sentence: str,
    *,
    retryable: bool = False,
) -> Refusal:
    refusal = Refusal(code, http, coap, mqtt[0], mqtt[1], retryable, sentence)
    TABLE[code] = refusal
    return refusal


_UNAUTHORISED = (5, 0x87)
_BAD_ID = (2, 0x85)
_AWAY = (3, 0x88)
_MALFORMED = (1, 0x81)

# Names ------------------------------------------------------------------------
DEVICE_ID_MALFORMED = _row(
    "device_id_malformed",
    400,
    "4.00",
    _BAD_ID,
    "A device ID is 1 to 64 of A-Z a-z 0-9 . - and starts with a letter or digit; "
    "choose another.",
)
DEVICE_ID_CASE = _row(
    "device_id_case",
    409,
    "4.00",
    _BAD_ID,
    "A registered device ID differs from this one only in upper and lower case; "
    "choose another.",
)
SERIAL_MALFORMED = _row(
    "serial_malformed",
    400,
    "4.00",
    _BAD_ID,
    "A serial number is 1 to 40 hexadecimal digits and not zero.",
)
PSK_IDENTITY_MALFORMED = _row(
    "psk_identity_malformed",
    400,
    "4.00",
    _BAD_ID,
    "A PSK identity is the device ID, '#' and the generation, such as pump-7#1.",
)
TRUST_DOMAIN_MALFORMED = _row(
    "trust_domain_malformed",
    400,
    "4.00",
    _BAD_ID,
    "A trust domain is lower-case letters, digits, '.', '-' and '_'.",
)

# Who is asking ----------------------------------------------------------------
CREDENTIAL_MISSING = _row(
    "credential_missing",
    401,
    "4.01",
    _UNAUTHORISED,
    "Prove who you are: by client certificate, by PSK, or by enrolment token "
    "(HTTP Basic, user: device ID, password: the token).",
)
TOKEN_REFUSED = _row(
    "token_refused",
    401,
    "4.01",
    _UNAUTHORISED,
    "The enrolment token is unknown, used up, expired, revoked or for another "
    "device; ask the fleet operator for a new one.",
)
CREDENTIAL_UNKNOWN = _row(
    "credential_unknown",
    403,
    "4.03",
    _UNAUTHORISED,
    "This credential chains to a CA of this fleet but is not in its registry; "
    "the fleet operator must look at where it came from.",
)
CREDENTIAL_REVOKED = _row(
    "credential_revoked",
    403,
    "4.03",
    _UNAUTHORISED,
    "This credential is revoked; use a newer one, or ask the fleet operator.",
)
CREDENTIAL_SUPERSEDED = _row(
    "credential_superseded",
    403,
    "4.03",
    _UNAUTHORISED,
    "This credential is superseded; use the newer one that the device was given.",
)
CREDENTIAL_EXPIRED = _row(
    "credential_expired",
    403,
    "4.03",
    _UNAUTHORISED,
    "This credential has expired; re-enrol with it while the grace period lasts, "
    "or enrol anew.",
)
CREDENTIAL_NOT_YET_VALID = _row(
    "credential_not_yet_valid",
    403,
    "4.03",
    _UNAUTHORISED,
    "This credential is not valid yet; wait until its notBefore.",
    retryable=True,
)
DEVICE_UNKNOWN = _row(
    "device_unknown",
    404,
    "4.04",
    _UNAUTHORISED,
    "No device of that ID is registered here.",
)
DEVICE_REVOKED = _row(
    "device_revoked",
    403,
    "4.03",
    _UNAUTHORISED,
    "This device is revoked; only the fleet operator can readmit it.",
)
DEVICE_SUSPENDED = _row(
    "device_suspended",
    403,
    "4.03",
    _UNAUTHORISED,
    "This device is suspended; it may come back when the fleet operator resumes it.",
    retryable=True,
)
DEVICE_RETIRED = _row(
    "device_retired",
    403,
    "4.03",
    _UNAUTHORISED,
    "This device is retired; its life in this fleet is over.",
)

# What it asks for -------------------------------------------------------------
PROFILE_UNKNOWN = _row(
    "profile_unknown",
    404,
    "4.04",
    _UNAUTHORISED,
    "No enrolment profile has that name; the fleet operator knows which exist.",
)
PROFILE_NOT_ALLOWED = _row(
    "profile_not_allowed",
    403,
    "4.03",
    _UNAUTHORISED,
    "This proof does not admit to that profile; use the one it was made for.",
)
CSR_MALFORMED = _row(
    "csr_malformed",
    400,
    "4.00",
    _MALFORMED,
    "The body is not one PKCS#10 request in base64 or DER; fix the client.",
)
CSR_SIGNATURE = _row(
    "csr_signature",
    400,
    "4.00",
    _MALFORMED,
    "The request's signature does not fit its key, or uses a weak hash; "
    "sign it again with the device's own key and SHA-256 or better.",
)
KEY_NOT_ALLOWED = _row(
    "key_not_allowed",
    400,
    "4.00",
    _MALFORMED,
    "The profile does not allow this kind or size of key; make a P-256 key.",
)
KEY_IN_USE = _row(
    "key_in_use",
    403,
    "4.03",
    _UNAUTHORISED,
    "This key belongs to another device; make a key that no other device has.",
)
NAME_NOT_ALLOWED = _row(
    "name_not_allowed",
    400,
    "4.00",
    _MALFORMED,
    "The request names something else than the device that proved itself; "
    "leave the names out or give the device's own.",
)
CHANNEL_BINDING_WRONG = _row(
    "channel_binding_wrong",
    400,
    "4.00",
    _MALFORMED,
    "The challengePassword is not this connection's tls-exporter or tls-unique; "
    "make the request on the connection that carries it.",
)
OPERATION_UNKNOWN = _row(
    "operation_unknown",
    404,
    "4.04",
    _UNAUTHORISED,
    "There is nothing under this address; see the documentation for what is.",
)
OPERATION_NOT_BUILT = _row(
    "operation_not_built",
    501,
    "5.01",
    _UNAUTHORISED,
    "This gateway does not offer this operation; enrol by simpleenroll.",
)
METHOD_NOT_ALLOWED = _row(
    "method_not_allowed",
    405,
    "4.05",
    _UNAUTHORISED,
    "This address does not take that method.",
)

# How it asks ------------------------------------------------------------------
REQUEST_MALFORMED = _row(
    "request_malformed",
    400,
    "4.00",
    _MALFORMED,
    "The request cannot be understood; fix the client.",
)
BODY_TOO_LARGE = _row(
    "body_too_large",
    413,
    "4.13",
    (3, 0x95),
    "The body is larger than any valid request; send less.",
)
REQUEST_SLOW = _row(
    "request_slow",
    408,
    "4.08",
    _AWAY,
    "The request did not arrive in time; send it again on a better connection.",
    retryable=True,
)
MEDIA_TYPE = _row(
    "media_type",
    415,
    "4.15",
    _MALFORMED,
    "This operation takes another media type; for enrolment application/pkcs10.",
)
TOO_MANY_REQUESTS = _row(
    "too_many_requests",
    429,
    "4.29",
    (3, 0x9F),
    "Too many requests at once; come back after the time given.",
    retryable=True,
)
PACKET_MALFORMED = _row(
    "packet_malformed",
    400,
    "4.00",
    _MALFORMED,
    "The MQTT packet breaks the specification; fix the client.",
)
PROTOCOL_VERSION = _row(
    "protocol_version",
    400,
    "4.00",
    (1, 0x84),
    "Only MQTT 3.1.1 and MQTT 5 are spoken here.",
)
PROTOCOL_ERROR = _row(
    "protocol_error",
    400,
    "4.00",
    (1, 0x82),
    "The MQTT packet comes where the protocol has no place for it; fix the client.",
)
AUTH_METHOD = _row(
    "auth_method",
    403,
    "4.03",
    (5, 0x8C),
    "TLS has proven who the device is; connect without an MQTT authentication method.",
)
SESSION_TAKEN_OVER = _row(
    "session_taken_over",
    409,
    "4.09",
    (3, 0x8E),
    "A newer connection has the same client identifier; give each program on the "
    "device its own, ID:NAME.",
)
CLIENT_ID_NOT_ALLOWED = _row(
    "client_id_not_allowed",
    403,
    "4.03",
    _BAD_ID,
    "The MQTT client identifier is empty, the device ID, or ID:NAME; change it.",
)
TOPIC_NOT_ALLOWED = _row(
    "topic_not_allowed",
    403,
    "4.03",
    _UNAUTHORISED,
    "A device publishes below devices/ID/up/ and subscribes below devices/ID/down/.",
)

# Nobody need act, or we must ---------------------------------------------------
AWAY = _row(
    "away",
    503,
    "5.03",
    _AWAY,
    "A part that this needs is away for the moment; come back after the time given.",
    retryable=True,
)
IN_PROGRESS = _row(
    "in_progress",
    503,
    "5.03",
    _AWAY,
    "The same request is being worked on; repeat it after the time given.",
    retryable=True,
)
OUT_OF_ORDER = _row(
    "out_of_order",
    503,
    "5.03",
    _AWAY,
    "The gateway needs its operator before this can work again.",
    retryable=True,
)
INTERNAL = _row(
    "internal",
    500,
    "5.00",
    _AWAY,
    "The gateway failed at this; its operator finds the incident by its number.",
    retryable=True,
)

# What operators are told --------------------------------------------------------
STATE_NOT_ALLOWED = _row(
    "state_not_allowed",
    409,
    "4.09",
    _UNAUTHORISED,
    "The device's present state does not allow this.",
)
TOKEN_UNKNOWN = _row(
    "token_unknown",
    404,
    "4.04",
    _UNAUTHORISED,
    "No enrolment token has that ID; `birthmark token list` shows which exist.",
)
ARGUMENT_MALFORMED = _row(
    "argument_malformed",
    400,
    "4.00",
    _MALFORMED,
    "An argument cannot be understood.",
)
