"""Where PINs come from, and that they show nowhere."""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provisioning.hsm.login import TokenConfig
from provisioning.hsm.pin import Pin, read_pin
from provisioning.model.errors import ConfigError, Unusable

if TYPE_CHECKING:
    from pathlib import Path


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_pin_does_not_show_in_its_repr():
    pin = Pin("1234567")
    config = TokenConfig("module.so", "label", pin)
    assert "1234567" not in f"{pin} {pin!r} {config} {config!r}"
    assert pin.text == "1234567"


def test_a_pin_from_a_file_ends_with_its_line(tmp_path):
    write(tmp_path / "pin", "12 34\n")
    assert read_pin(f"file:{tmp_path / 'pin'}").text == "12 34"
    write(tmp_path / "pin", "1234\r\nmore")
    assert read_pin("file:pin", folder=tmp_path).text == "1234"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666, 0o601])
def test_a_pin_file_that_others_can_open_is_refused(tmp_path, mode):
    write(tmp_path / "pin", "1234567", mode)
    with pytest.raises(Unusable, match="chmod 600") as caught:
        read_pin("file:pin", folder=tmp_path)
    assert "1234567" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_pin_file_of_the_owner_alone_is_read(tmp_path, mode):
    write(tmp_path / "pin", "1234567", mode)
    assert read_pin("file:pin", folder=tmp_path).text == "1234567"


def test_a_pin_file_that_is_not_there_or_empty_is_named(tmp_path):
    with pytest.raises(Unusable, match="pin cannot be read: No such file"):
        read_pin("file:pin", folder=tmp_path)
    write(tmp_path / "pin", "\n")
    with pytest.raises(Unusable, match="0 characters"):
        read_pin("file:pin", folder=tmp_path)
    with pytest.raises(Unusable, match="cannot be read"):
        read_pin(f"file:{tmp_path}")


def test_a_pin_file_that_is_no_text_is_not_quoted(tmp_path):
    (tmp_path / "pin").write_bytes(b"secret\xff\xfe")
    (tmp_path / "pin").chmod(0o600)
    with pytest.raises(Unusable, match="not text") as caught:
        read_pin("file:pin", folder=tmp_path)
    shown = "".join(traceback.format_exception(caught.value))
    assert "secret" not in shown


def test_a_pin_from_the_environment(monkeypatch):
    monkeypatch.setenv("BIRTHMARK_TEST_PIN", "1234")
    assert read_pin("env:BIRTHMARK_TEST_PIN").text == "1234"
    monkeypatch.delenv("BIRTHMARK_TEST_PIN")
    with pytest.raises(Unusable, match="BIRTHMARK_TEST_PIN"):
        read_pin("env:BIRTHMARK_TEST_PIN")


def test_a_pin_from_a_command_that_no_shell_sees(tmp_path):
    write(tmp_path / "say", "import sys; print(sys.argv[1])")
    source = f"command:{sys.executable} say '1234; id'"
    assert read_pin(source, folder=tmp_path).text == "1234; id"


def test_a_command_that_fails_is_named_by_its_program_only():
    with pytest.raises(Unusable, match="ended with 3") as caught:
        read_pin(f"command:{sys.executable} -c 'print(987654); raise SystemExit(3)'")
    assert "987654" not in str(caught.value)
    with pytest.raises(Unusable, match="cannot be run"):
        read_pin("command:no-such-program-here")


@given(st.text(max_size=30))
def test_what_is_no_source_is_not_repeated(text):
    with pytest.raises(ConfigError) as caught:
        read_pin(f"pin-{text}")
    assert "pin-" not in str(caught.value)


@pytest.mark.parametrize("source", ["1234", "file:", "command:", "command:'", ":x", ""])
def test_a_source_must_be_of_a_known_form(source):
    with pytest.raises(ConfigError):
        read_pin(source)


def test_nothing_but_the_child_of_a_pin_command_is_started_in_its_folder(tmp_path):
    before = os.getcwd()  # noqa: PTH109 - what the process says, not the path
    write(tmp_path / "say", "import os; print(os.getcwd())")
    source = f"command:{sys.executable} say"
    assert read_pin(source, folder=tmp_path).text == str(tmp_path)
    assert os.getcwd() == before  # noqa: PTH109 - as above
