"""The ``edgeseg`` command: one module per verb, errors mapped to exit codes in :mod:`edgeseg.cli.app`."""

from edgeseg.cli.app import main

__all__ = ["main"]
