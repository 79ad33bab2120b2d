"""Configurations of the server and of models: frozen, checked when built, all problems told at once."""
