"""Inference engines: GGUF conversion, comparison with transformers, and support by engine."""
