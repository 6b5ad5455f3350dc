"""``python -m polydraft.cli``: the command line where the console script is not on the path."""

from polydraft.cli.app import main

main()
