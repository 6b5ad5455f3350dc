"""How plugins are found and asked; ``polydraft._plugins`` has the host that uses it."""
