"""One API for speculative decoding, whatever engine runs it."""
