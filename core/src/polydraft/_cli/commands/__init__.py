"""One module per command: options in, calls to the library, records out to ``polydraft._cli.render``."""
