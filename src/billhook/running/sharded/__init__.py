"""Models whose parameters are sharded over ranks: gathered, taken apart, put together again, and read from their files."""
