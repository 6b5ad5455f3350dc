"""The commands, one a file: options in, calls to the library, records out to ``polydraft._cli.render``."""
