"""``python -m polydraft``: the command line where the console script is not on the path."""

from polydraft._cli.app import main

main()
