"""Small models and batches for pruning weights."""

import warnings

import torch
from small_configs import architectures, build, small_config

from billhook.model.linears import prunable, weight_of
from billhook.running.inputs import make_inputs


def batches_of(model, number=3):
    batches = []
    for seed in range(number):
        torch.manual_seed(seed)
        batch = {name: value for name, value in make_inputs(model).items() if isinstance(value, torch.Tensor)}
        for name, value in batch.items():
            if name.endswith("input_ids"):
                batch[name] = torch.randint_like(value, 3, 20)
            elif value.is_floating_point():
                batch[name] = torch.randn_like(value)
        batches.append(batch)
    return batches


def family(name):
    _, _, config_class, model_class = max((one for one in architectures() if one[1] == name), key=lambda one: "Seq2Seq" in one[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build(small_config(config_class), model_class)


def masks_of(model):
    return {name: weight_of(linear) != 0 for name, linear in prunable(model).items()}
