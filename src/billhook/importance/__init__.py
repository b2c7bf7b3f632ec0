"""Scores how much a unit matters, one paper a file."""
