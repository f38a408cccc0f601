"""Proof by type: what only a check may make is made in one file each."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for room in ("provisioning", "gateway", "device_agent", "hsm_sim")
    for path in (ROOT / room).rglob("*.py")
]
MAKERS = {
    "VerifiedCsr": "provisioning/x509/csr.py",
    "Admitted": "provisioning/enrol/admission.py",
}


def _called(call: ast.Call) -> str:
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _calls(path: Path) -> list[ast.Call]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize(("proof", "maker"), MAKERS.items())
def test_a_proof_is_made_in_one_file(proof: str, maker: str):
    found = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(_called(call) == proof for call in _calls(path))
    }
    assert found == {maker}


def test_no_proof_is_made_from_another_by_replace():
    """`replace(csr, wishes=...)` would be a proof that nobody checked."""
    words = ("csr", "admitted", "verified")
    for path in SOURCES:
        for call in _calls(path):
            if _called(call) == "replace" and call.args:
                subject = ast.unparse(call.args[0]).lower()
                assert not any(word in subject for word in words), (path, subject)


def test_the_admission_is_the_judges_alone():
    """Admitted is made by functions that raise PeerError before they come to it."""
    source = (ROOT / MAKERS["Admitted"]).read_text(encoding="utf-8")
    makers = [
        function
        for function in ast.walk(ast.parse(source))
        if isinstance(function, ast.FunctionDef)
        and any(
            _called(node) == "Admitted"
            for node in ast.walk(function)
            if isinstance(node, ast.Call)
        )
    ]
    assert makers
    for function in makers:
        assert "_check_request(" in ast.unparse(function), function.name
