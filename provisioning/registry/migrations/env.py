"""What alembic runs: the steps, on the connection that `upgrade` opened."""

from __future__ import annotations

from alembic import context

from provisioning.registry.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
)
# `upgrade` holds the transaction: the schema and its version change together.
context.run_migrations()
