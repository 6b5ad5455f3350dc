"""LiteRT-LM behind polydraft: files with the drafter inside."""
