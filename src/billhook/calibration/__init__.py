"""Text that methods are shown: packed token rows of several sources, and what the model itself writes."""
