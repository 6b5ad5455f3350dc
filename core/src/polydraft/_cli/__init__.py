"""The command line: ``app`` puts it together, ``commands`` has one module per command, ``render`` what they show."""
