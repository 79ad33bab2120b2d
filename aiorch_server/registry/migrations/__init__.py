"""Numbered migrations of the registry's tables, for Alembic; upgrade.py runs them."""
