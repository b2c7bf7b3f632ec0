"""What methods are shown: text of several sources as packed token rows, and what the model itself writes."""
