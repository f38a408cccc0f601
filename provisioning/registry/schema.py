"""The registry's tables, and how values are stored in them.

Times are microseconds since 1970 in UTC, as integers: they compare alike everywhere.
Names of states are the words of `model`. A DeviceId is stored as written, and once
more folded, which is what must be unique.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

if TYPE_CHECKING:
    from sqlalchemy import TextClause

SCHEMA_VERSION = "0001"
"""The newest migration; a registry of any other is refused."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite makes only INTEGER PRIMARY KEY the row's own number.
_ID = BigInteger().with_variant(Integer, "sqlite")

devices = Table(
    "devices",
    metadata,
    Column("id", _ID, primary_key=True, autoincrement=False),
    Column("device_id", String(64), nullable=False),
    Column("folded", String(64), nullable=False, unique=True),
    Column("state", String(16), nullable=False),
    Column("rotate_by", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("seen_at", BigInteger),
    Column("seen_auth", String(16)),
    Column("seen_resumed", Boolean),
    Column("seen_address", String(64)),
)

credentials = Table(
    "credentials",
    metadata,
    # A certificate has the number of the intent that it fulfils.
    Column("id", _ID, primary_key=True, autoincrement=False),
    Column("device", _ID, ForeignKey("devices.id"), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("line", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("serial", String(40), unique=True),
    Column("generation", Integer),
    Column("issuer", String(64)),
    Column("not_before", BigInteger, nullable=False),
    Column("not_after", BigInteger),
    Column("spki_sha256", LargeBinary(32)),
    Column("request_key", LargeBinary(32)),
    Column("certificate", LargeBinary),
    Column("first_seen", BigInteger),
    # 0, 1, or 2 for "more than once": a new one's second connection ends the old.
    Column("connections", SmallInteger, nullable=False),
    # When the grace of one that has a proven successor is over.
    Column("ends_at", BigInteger),
    Column("revoked_at", BigInteger),
    Column("reason", String(32)),
    Column("created_at", BigInteger, nullable=False),
    UniqueConstraint("device", "generation"),
    Index(None, "spki_sha256"),
)
# Partial indexes stay small; a query uses one when it repeats the words.
ENDING = text("credentials.ends_at IS NOT NULL AND credentials.state = 'active'")
UNPROVEN = text("credentials.state = 'pending'")
LIVING = text("credentials.state IN ('pending', 'active')")
REVOKED = text("credentials.revoked_at IS NOT NULL")
OPEN = text("intents.resolved IS NULL")


def _partial(name: str, where: TextClause, *columns: Column[Any]) -> None:
    # In an index's own condition columns stand bare.
    table = columns[0].table
    bare = text(where.text.replace(f"{table.name}.", ""))
    Index(name, *columns, sqlite_where=bare, postgresql_where=bare)


_partial("ix_credentials_ending", ENDING, credentials.c.ends_at)
_partial("ix_credentials_unproven", UNPROVEN, credentials.c.request_key)
_partial("ix_credentials_living", LIVING, credentials.c.not_after)
_partial("ix_credentials_revoked", REVOKED, credentials.c.issuer)

intents = Table(
    "intents",
    metadata,
    Column("id", _ID, primary_key=True, autoincrement=False),
    Column("request_key", LargeBinary(32), nullable=False),
    Column("device", _ID, ForeignKey("devices.id"), nullable=False),
    Column("line", String(64), nullable=False),
    Column("profile", String(64), nullable=False),
    Column("issuer", String(64), nullable=False),
    # Not unique here: 125 random bits need no index to tell them apart, and where it
    # matters, among certificates, there is one.
    Column("serial", String(40), nullable=False),
    Column("not_before", BigInteger, nullable=False),
    Column("not_after", BigInteger),
    Column("spki_sha256", LargeBinary(32), nullable=False),
    # Kept until the outcome is known.
    Column("csr", LargeBinary),
    Column("token", String(32), ForeignKey("tokens.id")),
    Column("auth", String(16), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("resolved", String(16)),
    Column("resolved_at", BigInteger),
    Column("why", Text),
)
for _column in ("request_key", "spki_sha256", "device", "created_at"):
    _partial(f"ix_intents_open_{_column}", OPEN, intents.c[_column])

tokens = Table(
    "tokens",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("hash", LargeBinary(32), nullable=False, unique=True),
    Column("device", _ID, ForeignKey("devices.id")),
    Column("uses", Integer, nullable=False),
    Column("used", Integer, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("profile", String(64)),
    Column("revoked_at", BigInteger),
    Column("created_at", BigInteger, nullable=False),
)

changes = Table(
    "changes",
    metadata,
    # From a counter that is locked until commit: in PostgreSQL a sequence would let
    # a smaller number appear after a larger one, and a follower would miss it.
    Column("seq", _ID, primary_key=True, autoincrement=False),
    Column("kind", String(16), nullable=False),
    Column("device", String(64)),
    Column("detail", Text, nullable=False),
    Column("at", BigInteger, nullable=False),
)

gateways = Table(
    "gateways",
    metadata,
    Column("id", _ID, primary_key=True, autoincrement=False),
    Column("name", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("applied_seq", BigInteger, nullable=False),
    Column("joined_at", BigInteger, nullable=False),
    Column("beat_at", BigInteger, nullable=False),
    UniqueConstraint("name", "pid"),
)

audit = Table(
    "audit",
    metadata,
    Column("id", _ID, primary_key=True, autoincrement=False),
    Column("at", BigInteger, nullable=False),
    Column("event", String(64), nullable=False),
    Column("actor", String(255), nullable=False),
    Column("fields", Text, nullable=False),
)

counters = Table(
    "counters",
    metadata,
    Column("name", String(80), primary_key=True),
    Column("value", BigInteger, nullable=False),
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_NO_END = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


def to_us(at: datetime) -> int:
    """Microseconds since 1970 of an aware time, exactly."""
    return (at - _EPOCH) // _MICROSECOND


def from_us(value: int) -> datetime:
    """The aware UTC time of so many microseconds since 1970."""
    return _EPOCH + timedelta(microseconds=value)


def end_to_us(not_after: datetime | None) -> int | None:
    """As stored: 9999-12-31T23:59:59Z says "no end" (RFC 5280, 4.1.2.5)."""
    if not_after is None or not_after >= _NO_END:
        return None
    return to_us(not_after)


def maybe_from_us(value: int | None) -> datetime | None:
    """The time, where there is one."""
    return None if value is None else from_us(value)
