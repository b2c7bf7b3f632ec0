"""A third of the tokens removed from a small model of every architecture of transformers that has a vocabulary, and saved.

`python benchmarks/vocabulary_sweep.py` prints each model that is not a standard checkpoint afterwards, with the reason, and
counts. Before a removal is final, billhook compares the logits of all other tokens; before a checkpoint is in place, those of the
loaded model.
"""

import collections
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from small_configs import architectures, build, has_experts, small_config

import billhook as bh
from billhook.model.token_ids import named_token_ids
from billhook.units.find import find_units


def outcome(config_class, model_class):
    """How the model is saved without a third of its tokens; None if it has no vocabulary."""
    try:
        config = small_config(config_class)
        model = build(config, model_class, "batched_mm" if has_experts(config) else "eager").eval()
        units = find_units(model, "token")
    except Exception:  # no small model, no inputs, or no vocabulary
        return None
    where, layer = next(iter(units.items()))
    try:
        named = named_token_ids(model, layer.count())
        removed = [token for token in range(layer.count()) if token % 3 == 1 and token not in named]
        bh.pruning.prune_units(model, {where: removed}, kind="token")
        with tempfile.TemporaryDirectory() as folder:
            return bh.save(model, Path(folder, "out")).way
    except (ValueError, RuntimeError) as error:
        return f"refused: {' '.join(str(error).split())[:150]}"


def main():
    """Every architecture."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    counts, seen = collections.Counter(), set()
    for _, _, config_class, model_class in architectures():
        if model_class not in seen and (how := outcome(config_class, model_class)) is not None:
            counts[how.partition(":")[0]] += 1
            if how != "plain":
                print(model_class.__name__, how, flush=True)
        seen.add(model_class)
    print(dict(counts))


if __name__ == "__main__":
    main()
