"""Finds a Hugging Face model in a module, builds it without weights, and changes its tensors and shape."""
