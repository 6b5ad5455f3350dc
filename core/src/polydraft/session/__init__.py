"""Sessions: a loaded pair that generates. ``base`` is the public API, ``stepping`` runs the core's loop."""
