"""The five kinds of error, told apart by who must act."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from provisioning.model.refusals import Refusal


class PeerError(Exception):
    """The device or client asked for what it may not have: answer with the refusal.

    detail: one sentence that fits this case better than the table's; never a secret.
    """

    def __init__(self, refusal: Refusal, detail: str | None = None) -> None:
        super().__init__(detail or refusal.sentence)
        self.refusal = refusal
        self.detail = detail or refusal.sentence


class Unavailable(Exception):  # noqa: N818 - STYLE names the kinds
    """Token, registry, disk or broker is away: nobody need act, come back later."""

    def __init__(self, what: str, retry_after_s: float = 5.0) -> None:
        super().__init__(f"{what} is away; try again in {retry_after_s:g} s")
        self.what = what
        self.retry_after_s = retry_after_s


class Unusable(Exception):  # noqa: N818 - STYLE names the kinds
    """The operator must act before this can work again: say what to do."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what} is unusable: {why}")
        self.what = what
        self.why = why


class OutcomeUnknown(Exception):  # noqa: N818 - STYLE names the kinds
    """Asked outside, answer lost: resolved from the intent, never retried blindly."""

    def __init__(self, intent: str) -> None:
        super().__init__(f"the outcome of {intent} is not known")
        self.intent = intent


class ConfigError(Exception):
    """The configuration is wrong: whoever wrote the file is told where and why."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")
        self.where = where
        self.why = why
