"""Tests that only a GPU can tell: python -m pytest tests/gpu."""
