"""Sessions: ``session`` holds a loaded engine for apps; ``stream`` and ``call`` are one call of it."""
