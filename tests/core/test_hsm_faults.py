"""The table of faults: every code that STANDARDS names, and those nobody named."""

from __future__ import annotations

import pkcs11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsm_sim.faults import ckr
from provisioning.hsm.faults import LONGEST_WAIT_S, TABLE, Kind, judge, wait_s

STANDARDS = {
    Kind.LOST: "SESSION_HANDLE_INVALID SESSION_CLOSED USER_NOT_LOGGED_IN "
    "OBJECT_HANDLE_INVALID KEY_HANDLE_INVALID",
    Kind.AWAY: "DEVICE_REMOVED TOKEN_NOT_PRESENT DEVICE_ERROR DEVICE_MEMORY "
    "FUNCTION_FAILED GENERAL_ERROR CRYPTOKI_NOT_INITIALIZED HOST_MEMORY "
    "FUNCTION_CANCELED",
    # The standard row calls the last two unusable; neither may be tried again either.
    Kind.PIN: "PIN_INCORRECT PIN_LOCKED PIN_EXPIRED",
    Kind.UNUSABLE: "MECHANISM_INVALID KEY_TYPE_INCONSISTENT "
    "KEY_FUNCTION_NOT_PERMITTED ATTRIBUTE_VALUE_INVALID TEMPLATE_INCONSISTENT",
}


@pytest.mark.parametrize(
    ("kind", "code"),
    [(kind, code) for kind, codes in STANDARDS.items() for code in codes.split()],
)
def test_a_code_of_the_standards_has_its_kind(kind, code):
    assert TABLE[code].kind is kind
    assert judge(ckr(code)) is TABLE[code]


def test_every_row_is_found_by_what_python_pkcs11_raises():
    for code, row in TABLE.items():
        assert judge(ckr(code)) is row


def test_every_error_of_python_pkcs11_has_a_kind():
    for error in pkcs11.PKCS11Error.__subclasses__():
        fault = judge(error())
        assert fault.code
        assert fault.why


def test_what_a_vendor_alone_knows_is_taken_as_away():
    assert judge(pkcs11.PKCS11Error("Unmapped error code 0x80000042")).kind is Kind.AWAY


def test_a_code_of_the_standard_that_nobody_foresaw_is_the_operators():
    assert judge(pkcs11.PKCS11Error("Unmapped error code 0x51")).kind is Kind.UNUSABLE


@given(st.text())
def test_any_text_is_judged(text):
    assert judge(pkcs11.PKCS11Error(text)).why


def test_what_the_operator_must_do_is_in_the_row():
    for row in TABLE.values():
        if row.kind in (Kind.UNUSABLE, Kind.PIN):
            assert ";" in row.why, row


@given(st.integers(min_value=1, max_value=10_000))
def test_pauses_grow_to_a_ceiling(failures):
    assert 0 < wait_s(failures) <= wait_s(failures + 1) <= LONGEST_WAIT_S
