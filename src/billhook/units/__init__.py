"""Units of a model (heads, channels, experts, blocks), and gates on them."""
