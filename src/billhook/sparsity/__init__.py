"""Weight pruning: criteria, masks, patterns, and sparsity allocation."""
