"""Steps from one schema to the next, run by alembic and packaged with the program."""
