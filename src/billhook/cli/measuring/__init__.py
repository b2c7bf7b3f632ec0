"""Commands that measure and change nothing: what a model weighs, what it can lose, how well it answers and how fast."""
