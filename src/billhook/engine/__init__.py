"""Block stores, and runs through the blocks of a model."""
