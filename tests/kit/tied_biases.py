"""T5, whose layers share a position bias."""

import transformers


def t5():
    config = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "vocab_size": 64}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**config, decoder_start_token_id=0)).eval()
