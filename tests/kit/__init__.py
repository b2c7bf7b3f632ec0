"""What tests share: families of models, fits, events, oracles."""
