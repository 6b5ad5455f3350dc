"""``llama-server``, the user's own program or a running one: a crash of llama.cpp does not end the app."""
