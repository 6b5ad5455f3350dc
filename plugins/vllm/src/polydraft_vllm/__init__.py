"""vLLM as a whole engine of polydraft: in process, and as a client of a server."""
