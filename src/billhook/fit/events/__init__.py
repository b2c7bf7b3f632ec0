"""Carries out events in a fit: when they are due, in which rounds, and what follows a change of shape."""
