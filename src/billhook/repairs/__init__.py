"""Refits by least squares what reads the units that were removed (ZipLM, OSSCAR)."""
