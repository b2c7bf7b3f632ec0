"""Trains a small mixture of experts that has learned something, for figures on experts.

`python benchmarks/train_mixture.py OUT --texts wikitext-2/valid.txt foldoc/foldoc_train.txt --minutes 60` trains a Qwen3-MoE of 8
blocks with 16 experts, of which 2 are active, with the tokenizer of billhook's embedded model. It stops after that time, whatever
the machine; the learning rate falls to zero until then.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from billhook import assets

LENGTH, ROWS, RATE, BALANCE = 256, 8, 2e-3, 0.02
TOKENIZER = Path(assets.__file__).parent / "model"


def imbalance(logits):
    """The load-balancing loss of a block's router, 1 if all experts receive as many tokens (Switch Transformers, equation 4)."""
    probabilities = logits.float().softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(2).indices, 0.5)
    return logits.shape[1] * (chosen.mean(0) * probabilities.mean(0)).sum()


def main():
    """Trains and saves the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--minutes", type=float, default=60)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    ids = [torch.tensor(tokenizer(Path(path).read_text(), verbose=False)["input_ids"]) for path in arguments.texts]
    windows = torch.cat([text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH) for text in ids])
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer), hidden_size=192, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2,
            head_dim=32, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=192, intermediate_size=384,
            max_position_embeddings=1024, tie_word_embeddings=True, norm_topk_prob=True,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    model.set_experts_implementation("eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    start, step = time.monotonic(), 0
    while (progress := (time.monotonic() - start) / (60 * arguments.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * progress)) / 2
        rows = windows[torch.randint(len(windows), (ROWS,))]
        output = model(input_ids=rows, labels=rows, output_router_logits=True)
        balance = sum(map(imbalance, output.router_logits)) / len(output.router_logits)
        loss = output.loss - model.router_aux_loss_coef * output.aux_loss  # that of transformers is over all blocks together
        (loss + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            losses = f"loss {loss.item():.3f}, imbalance {balance.item():.2f}"
            print(f"{step} steps of {ROWS * LENGTH} tokens, {progress:.0%} of the time: {losses}", flush=True)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
