"""Where the program ``polydraft`` and ``python -m polydraft`` start."""

import sys

__all__ = ["main"]


def main() -> None:
    """Entry point; Ctrl-C while the command line is still imported ends it as it does later."""
    try:
        from polydraft._cli.app import main as run

        run()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
