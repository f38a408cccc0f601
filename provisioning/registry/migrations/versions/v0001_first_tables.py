"""The first tables: devices, credentials, intents, tokens, changes, audit events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# SQLite makes only INTEGER PRIMARY KEY the row's own number.
ROW = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

ENDING = sa.text("ends_at IS NOT NULL AND state = 'active'")
UNPROVEN = sa.text("state = 'pending'")
LIVING = sa.text("state IN ('pending', 'active')")
REVOKED = sa.text("revoked_at IS NOT NULL")
OPEN = sa.text("resolved IS NULL")


def upgrade() -> None:
    """Apply this step."""
    _followers()
    _devices()
    _credentials()
    _tokens()
    _intents()


def _followers() -> None:
    op.create_table(
        "audit",
        sa.Column("id", ROW, autoincrement=False, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("event", sa.String(length=64), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("fields", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
    )
    op.create_table(
        "changes",
        sa.Column("seq", ROW, autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("device", sa.String(length=64)),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_changes")),
    )
    op.create_table(
        "counters",
        sa.Column("name", sa.String(length=80), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_counters")),
    )
    op.create_table(
        "gateways",
        sa.Column("id", ROW, autoincrement=False, nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("applied_seq", sa.BigInteger(), nullable=False),
        sa.Column("joined_at", sa.BigInteger(), nullable=False),
        sa.Column("beat_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_gateways")),
        sa.UniqueConstraint("name", "pid", name=op.f("uq_gateways_name_pid")),
    )


def _devices() -> None:
    op.create_table(
        "devices",
        sa.Column("id", ROW, autoincrement=False, nullable=False),
        sa.Column("device_id", sa.String(length=64), nullable=False),
        sa.Column("folded", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("rotate_by", sa.BigInteger()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("seen_at", sa.BigInteger()),
        sa.Column("seen_auth", sa.String(length=16)),
        sa.Column("seen_resumed", sa.Boolean()),
        sa.Column("seen_address", sa.String(length=64)),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_devices")),
        sa.UniqueConstraint("folded", name=op.f("uq_devices_folded")),
    )


def _credentials() -> None:
    op.create_table(
        "credentials",
        sa.Column("id", ROW, autoincrement=False, nullable=False),
        sa.Column("device", ROW, nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("line", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("serial", sa.String(length=40)),
        sa.Column("generation", sa.Integer()),
        sa.Column("issuer", sa.String(length=64)),
        sa.Column("not_before", sa.BigInteger(), nullable=False),
        sa.Column("not_after", sa.BigInteger()),
        sa.Column("spki_sha256", sa.LargeBinary(length=32)),
        sa.Column("request_key", sa.LargeBinary(length=32)),
        sa.Column("certificate", sa.LargeBinary()),
        sa.Column("first_seen", sa.BigInteger()),
        sa.Column("connections", sa.SmallInteger(), nullable=False),
        sa.Column("ends_at", sa.BigInteger()),
        sa.Column("revoked_at", sa.BigInteger()),
        sa.Column("reason", sa.String(length=32)),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["device"], ["devices.id"], name=op.f("fk_credentials_device")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_credentials")),
        sa.UniqueConstraint(
            "device", "generation", name=op.f("uq_credentials_device_generation")
        ),
        sa.UniqueConstraint("serial", name=op.f("uq_credentials_serial")),
    )
    op.create_index(
        "ix_credentials_ending",
        "credentials",
        ["ends_at"],
        sqlite_where=ENDING,
        postgresql_where=ENDING,
    )
    op.create_index(
        "ix_credentials_living",
        "credentials",
        ["not_after"],
        sqlite_where=LIVING,
        postgresql_where=LIVING,
    )
    op.create_index(
        "ix_credentials_revoked",
        "credentials",
        ["issuer"],
        sqlite_where=REVOKED,
        postgresql_where=REVOKED,
    )
    op.create_index(op.f("ix_credentials_spki_sha256"), "credentials", ["spki_sha256"])
    op.create_index(
        "ix_credentials_unproven",
        "credentials",
        ["request_key"],
        sqlite_where=UNPROVEN,
        postgresql_where=UNPROVEN,
    )


def _tokens() -> None:
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("hash", sa.LargeBinary(length=32), nullable=False),
        sa.Column("device", ROW),
        sa.Column("uses", sa.Integer(), nullable=False),
        sa.Column("used", sa.Integer(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("profile", sa.String(length=64)),
        sa.Column("revoked_at", sa.BigInteger()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["device"], ["devices.id"], name=op.f("fk_tokens_device")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tokens")),
        sa.UniqueConstraint("hash", name=op.f("uq_tokens_hash")),
    )


def _intents() -> None:
    op.create_table(
        "intents",
        sa.Column("id", ROW, autoincrement=False, nullable=False),
        sa.Column("request_key", sa.LargeBinary(length=32), nullable=False),
        sa.Column("device", ROW, nullable=False),
        sa.Column("line", sa.String(length=64), nullable=False),
        sa.Column("profile", sa.String(length=64), nullable=False),
        sa.Column("issuer", sa.String(length=64), nullable=False),
        sa.Column("serial", sa.String(length=40), nullable=False),
        sa.Column("not_before", sa.BigInteger(), nullable=False),
        sa.Column("not_after", sa.BigInteger()),
        sa.Column("spki_sha256", sa.LargeBinary(length=32), nullable=False),
        sa.Column("csr", sa.LargeBinary()),
        sa.Column("token", sa.String(length=32)),
        sa.Column("auth", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("resolved", sa.String(length=16)),
        sa.Column("resolved_at", sa.BigInteger()),
        sa.Column("why", sa.Text()),
        sa.ForeignKeyConstraint(
            ["device"], ["devices.id"], name=op.f("fk_intents_device")
        ),
        sa.ForeignKeyConstraint(
            ["token"], ["tokens.id"], name=op.f("fk_intents_token")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_intents")),
    )
    op.create_index(
        "ix_intents_open_created_at",
        "intents",
        ["created_at"],
        sqlite_where=OPEN,
        postgresql_where=OPEN,
    )
    op.create_index(
        "ix_intents_open_device",
        "intents",
        ["device"],
        sqlite_where=OPEN,
        postgresql_where=OPEN,
    )
    op.create_index(
        "ix_intents_open_request_key",
        "intents",
        ["request_key"],
        sqlite_where=OPEN,
        postgresql_where=OPEN,
    )
    op.create_index(
        "ix_intents_open_spki_sha256",
        "intents",
        ["spki_sha256"],
        sqlite_where=OPEN,
        postgresql_where=OPEN,
    )
