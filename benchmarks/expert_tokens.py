"""From how many calibration tokens of an expert Wanda's norms prune its matrices better than magnitude.

`python benchmarks/expert_tokens.py MODEL --train a.txt b.txt` prints, for each number of tokens, the output error at 50% on 400
other tokens of the same expert over that of magnitude, for the matrices of experts in three blocks of `train_mixture.py`'s model.
"""

import argparse
from collections import defaultdict
from functools import partial

import torch
from mixture import windows
from transformers import AutoTokenizer

import billhook as bh
from billhook.model import ExpertLinear, expert_layers, prunable, weight_of

BLOCKS = (".0.mlp.", ".3.mlp.", ".6.mlp.")
TOKENS, TEST = (1, 2, 4, 8, 16, 32, 64, 128, 256), 400


@torch.no_grad()
def inputs_and_weights(model, rows):
    """The inputs of each matrix, `[tokens, in_features]`, and the matrix."""
    seen = defaultdict(list)

    def keep(name, layer, arguments):
        seen[name].append(arguments[0].flatten(0, -2).clone())

    with expert_layers(model):
        layers = {name: layer for name, layer in prunable(model).items() if isinstance(layer, ExpertLinear)}
        layers = {name: layer for name, layer in layers.items() if any(block in name for block in BLOCKS)}
        hooks = [layer.register_forward_pre_hook(partial(keep, name)) for name, layer in layers.items()]
        for row in rows:
            model(input_ids=row[None])
        for hook in hooks:
            hook.remove()
        return {name: (torch.cat(seen[name]), weight_of(layer).clone()) for name, layer in layers.items() if name in seen}


def error(scores, weight, inputs):
    """The squared output error without the lower half of the scores of each row."""
    keep = torch.zeros_like(weight).scatter_(1, scores.topk(weight.shape[1] - weight.shape[1] // 2, dim=1).indices, 1)
    return float((inputs @ (weight * (1 - keep)).T).square().sum())


def main():
    """Prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", nargs="+", required=True)
    options = parser.parse_args()
    model, tokenizer = bh.load(options.model, dtype="float32").eval(), AutoTokenizer.from_pretrained(options.model)
    ratios, generator = defaultdict(list), torch.Generator().manual_seed(0)
    rows = torch.cat([windows(tokenizer, path, 48) for path in options.train])
    for inputs, weight in inputs_and_weights(model, rows).values():
        if len(inputs) < TOKENS[-1] + TEST:
            continue
        inputs = inputs[torch.randperm(len(inputs), generator=generator)]
        dense = error(weight.abs(), weight, inputs[-TEST:])
        for count in TOKENS:
            ratios[count].append(error(weight.abs() * inputs[:count].norm(dim=0), weight, inputs[-TEST:]) / dense)
    for count, each in ratios.items():
        values = torch.tensor(each)
        print(
            f"{count} tokens: median {values.median():.2f}, worse in {(values > 1).float().mean():.0%} of {len(values)} matrices"
        )


if __name__ == "__main__":
    main()
