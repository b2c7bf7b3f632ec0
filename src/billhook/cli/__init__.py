"""The `billhook` command, one file a subcommand."""
