"""llama.cpp's server as an engine: its HTTP, the rounds that it reports, and the session's engine."""
