"""Saves Hugging Face folders and verifies them; turns Lightning checkpoints into them."""
