"""Searches for the best smaller model within one budget: how much each place of a model keeps."""
