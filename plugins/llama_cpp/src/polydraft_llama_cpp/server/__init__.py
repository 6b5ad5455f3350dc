"""The backend ``llama-server``: a crash of llama.cpp does not end the app."""
