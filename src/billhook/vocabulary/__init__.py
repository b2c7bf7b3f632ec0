"""The vocabulary as a unit: which tokens are used, and tokenizers without the others."""
