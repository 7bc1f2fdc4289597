"""The HTTP API: `create_app(sup)` for a server of its own, `mount(app, sup)` to put it into somebody's application."""

from mlxsup.api.app import create_app, mount

__all__ = ["create_app", "mount"]
