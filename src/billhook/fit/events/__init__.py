"""Carries out events in a fit: when they are due, in rounds or in stages, and what follows a change of shape."""
