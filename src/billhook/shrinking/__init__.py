"""Searches for the best smaller model within one budget: how much each layer of a model keeps."""
