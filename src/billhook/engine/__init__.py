"""Where the blocks of a model live, and how runs go through them."""
