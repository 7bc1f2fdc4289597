"""The command line: `mlxsup run`, `serve`, `ps` and the rest. One module per group of verbs, loaded when its verb is used."""

from mlxsup.cli.app import main

__all__ = ["main"]
