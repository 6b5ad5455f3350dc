"""Sessions: a loaded pair that generates.

``base`` is what apps use and whole engines subclass, ``stream`` a call in progress, ``stepping`` runs the core's loop.
For plugins, the names below are public.
"""

from polydraft.session.base import Session
from polydraft.session.stream import Generation, TokenStream

__all__ = ["Generation", "Session", "TokenStream"]
