"""Multi-head against multi-query attention from scratch on the embedded text, at equal steps and data (MQA, 1911.02150).

Three models: multi-head; multi-query with feed-forwards widened to equal parameters, as the paper compares them; and multi-query
as wide as the first, and so smaller. Two seeds take six and a half minutes of processor time.
"""

import argparse
import statistics

import lightning.pytorch as pl
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

import billhook as bh


def widened(config: PretrainedConfig, num_key_value_heads: int) -> PretrainedConfig:
    """A config with fewer KV heads, whose wider MLPs bring back the parameters (section 4 of the paper).

    w' = w + (P(h, w) - P(h', w)) / (P(h, w + 1) - P(h, w)), with P(h, w) parameters at h KV heads and MLP width w.
    """

    def count(**changes: int) -> int:
        with torch.device("meta"):
            return LlamaForCausalLM(LlamaConfig(**config.to_diff_dict() | changes)).num_parameters()

    width, heads = config.intermediate_size, {"num_key_value_heads": num_key_value_heads}
    saved, channel = count() - count(**heads), count(intermediate_size=width + 1) - count()
    return LlamaConfig(**config.to_diff_dict() | heads | {"intermediate_size": width + round(saved / channel)})


def train(config: PretrainedConfig, seed: int, steps: int) -> tuple[bh.TransformerModule, float]:
    """A model with random weights after some steps, and its validation perplexity."""
    pl.seed_everything(seed)
    module = bh.TransformerModule(config, lr=2e-3, weight_decay=0.1, warmup=0.1)
    data = bh.TextDataModule("tiny", tokenizer="tiny", length=128, batch_size=8, seed=seed)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=steps, gradient_clip_val=1.0, limit_val_batches=0, **quiet)
    trainer.fit(module, data)
    perplexity = pl.Trainer(**quiet).validate(module, data, verbose=False)[0]["val_perplexity"]
    print(f"{config.num_key_value_heads} KV heads, width {config.intermediate_size}, seed {seed}: {perplexity:.2f}", flush=True)
    return module, perplexity


def main(steps: int, seeds: int) -> None:
    """Trains each model with each seed and prints the table."""
    many = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    one = LlamaConfig(**many.to_diff_dict() | {"num_key_value_heads": 1})
    models = {"multi-head": many, "multi-query, equal parameters": widened(many, 1), "multi-query, as wide": one}
    rows = []
    for name, config in models.items():
        runs = [train(config, seed, steps) for seed in range(seeds)]
        values, weight = [perplexity for _, perplexity in runs], bh.summary(runs[0][0])
        spread = f" +- {statistics.stdev(values):.2f}" if seeds > 1 else ""
        figures = f"{weight.params:>12,}{weight.kv_cache_bytes:>17,}{config.intermediate_size:>8}"
        rows.append(f"{name:<32}{figures}   {statistics.mean(values):.2f}{spread}")
    print(f"{'':<32}{'parameters':>12}{'KV bytes/token':>17}{'width':>8}   perplexity after {steps} steps")
    print("\n".join(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    main(**vars(parser.parse_args()))
