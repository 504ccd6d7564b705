"""The command line. Nothing heavy is imported before a command needs it: ``--help`` takes a fraction of a second."""

from unisono.cli.app import main

__all__ = ["main"]
