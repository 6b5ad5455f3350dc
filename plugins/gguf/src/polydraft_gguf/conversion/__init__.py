"""Converts a checkpoint in the layout of Transformers to a GGUF file, with the ``gguf`` package and numpy alone."""
