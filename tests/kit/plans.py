"""Names of places in a small Llama."""

MLPS = ["model.layers.0.mlp", "model.layers.1.mlp"]  # of families.llama: 48 channels each, 32 residual channels


ATTENTIONS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
