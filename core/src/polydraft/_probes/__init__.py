"""Asking backends about this machine in processes of their own: one that aborts or hangs costs only its own answer."""
