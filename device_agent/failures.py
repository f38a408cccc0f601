"""How a command of the agent can end badly, told apart by who must act.

The server's five kinds name who must act behind the gateway; from a device's side it is
somebody else, so there are kinds of its own, each with its exit code (DESIGN). Wrong
usage is the model's ConfigError, an unusable state the model's Unusable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from provisioning.model.errors import ConfigError, Unusable

if TYPE_CHECKING:
    from datetime import timedelta

DONE = 0
WRONG_USAGE = 2
REFUSED = 3
NOT_NOW = 4
UNUSABLE = 5
UNTRUSTED = 6


class RefusedError(Exception):
    """The gateway refused; the same request will not be answered otherwise.

    code: as in the refusal table. The text is the gateway's own sentence.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class NotNowError(Exception):
    """Not reachable, told to wait, or no agreement: later it may work.

    retry_after: what the gateway asked for. handshake: it was there, but did not take
    the credential.
    """

    def __init__(
        self,
        why: str,
        *,
        retry_after: timedelta | None = None,
        handshake: bool = False,
    ) -> None:
        super().__init__(why)
        self.retry_after = retry_after
        self.handshake = handshake


class UntrustedError(Exception):
    """The server is not the one it should be: whoever set up the device must look."""


Failure = RefusedError | NotNowError | UntrustedError | Unusable | ConfigError
FAILURES = (RefusedError, NotNowError, UntrustedError, Unusable, ConfigError)


def exit_code(failure: Failure) -> int:
    """The number that the command ends with."""
    match failure:
        case RefusedError():
            return REFUSED
        case NotNowError():
            return NOT_NOW
        case UntrustedError():
            return UNTRUSTED
        case Unusable():
            return UNUSABLE
        case ConfigError():
            return WRONG_USAGE


def document_of(failure: Failure) -> dict[str, object]:
    """A failure as `--json` prints it."""
    codes = {
        RefusedError: "refused",
        NotNowError: "not_now",
        UntrustedError: "server_untrusted",
        Unusable: "state_unusable",
        ConfigError: "usage",
    }
    code = failure.code if isinstance(failure, RefusedError) else codes[type(failure)]
    return {
        "code": code,
        "detail": str(failure),
        "retryable": isinstance(failure, NotNowError),
    }
