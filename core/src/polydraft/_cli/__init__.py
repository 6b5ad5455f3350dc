"""The command line. ``app`` puts it together; one command a file in ``commands``, what they show in ``render``."""
