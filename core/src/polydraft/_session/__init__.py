"""Sessions: a loaded pair that generates. ``session`` is what apps use, ``stream`` and ``call`` one call of it."""
