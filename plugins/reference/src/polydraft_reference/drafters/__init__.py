"""Drafters of the reference engine; a draft model is the core's, ``polydraft.engine_parts.draft_model``."""
