"""An example of a third-party plugin for polydraft. ``docs/plugin-guide.md`` of polydraft walks through it."""
