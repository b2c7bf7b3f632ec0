"""Models that are larger than memory: their blocks come from safetensors files when they compute, and go again."""
