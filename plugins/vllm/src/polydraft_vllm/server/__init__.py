"""vLLM as a server: the command that starts one, a client of a running one, and the session over it."""
