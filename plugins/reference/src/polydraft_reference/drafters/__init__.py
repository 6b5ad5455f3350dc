"""Drafters of the reference engine. A draft model is not here: ``polydraft.engines.draft_model`` drafts with it."""
