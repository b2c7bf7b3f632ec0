"""Runs the command line: `python -m billhook` is `billhook`."""

from billhook.cli.main import main

if __name__ == "__main__":
    main()
