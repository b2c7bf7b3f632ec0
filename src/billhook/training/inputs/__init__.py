"""Reads sound, prepares images, and changes those that are trained on."""
