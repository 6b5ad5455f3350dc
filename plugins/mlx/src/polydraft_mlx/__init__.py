"""MLX behind polydraft."""
