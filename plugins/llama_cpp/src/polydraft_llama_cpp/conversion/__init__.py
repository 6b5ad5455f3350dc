"""From a checkpoint in the layout of Transformers to a GGUF file; needs the ``gguf`` package and numpy only."""
