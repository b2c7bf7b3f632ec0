"""Lightning integration of callbacks: events, data, ranks, and checkpoints."""
