"""What polydraft's plugins for llama.cpp share: GGUF files, and the protocol of llama.cpp's server."""
