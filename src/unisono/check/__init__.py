"""Invariants as commands."""
