"""Environments of engines: virtual environments that ``polydraft engines install`` makes in the user's data folder."""
