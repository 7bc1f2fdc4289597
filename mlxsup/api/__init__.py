"""The HTTP API: `create_app(sup)` for a server of its own and `serving` for its sockets, `mount(app, sup)` to put it into
somebody's application.
"""

from mlxsup.api.app import create_app, mount
from mlxsup.api.connections import serving

__all__ = ["create_app", "mount", "serving"]
