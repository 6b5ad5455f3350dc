"""An OpenAI-compatible server over any backend: ``polydraft serve``, or ``create_app`` in one's own ASGI server.

It uses public names of the core only, and knows no engine.
"""

from polydraft_server.app import create_app
from polydraft_server.run import listen, serve
from polydraft_server.settings import KEY_VARIABLE, ServerSettings, server_settings

__all__ = ["KEY_VARIABLE", "ServerSettings", "create_app", "listen", "serve", "server_settings"]
