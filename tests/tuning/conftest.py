"""Tiny random models made by transformers, on disk: the referee's own files."""

from tiny_models import saved  # noqa: F401  a fixture
