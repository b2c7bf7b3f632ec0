"""Small models with attention of every kind."""

import functools
import warnings

import oracle
import torch
import transformers
from small_configs import architectures, build, has_experts, small_config

from billhook.running.inputs import make_inputs
from billhook.units.find import find_units
from kit.oracle_families import FAMILIES

WITHOUT = ("mamba", "recurrent_gemma", "convnext", "resnet")  # two layers of recurrent_gemma have none


ATTENTIVE = [family for family in FAMILIES if family not in WITHOUT]


SEQ2SEQ = ["BartForConditionalGeneration", "WhisperForConditionalGeneration"]  # others than the first class of a family


class Small:
    """A small model in float64 with every parameter random, what it is run with, and its heads."""

    def __init__(self, name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformers.logging.set_verbosity_error()
            made = next(one for one in architectures() if name in (one[1], one[3].__name__))
            config = small_config(made[2], **({"n_heads": 8} if name == "mpt" else {}))
            self.model = build(config, made[3], "batched_mm" if has_experts(config) else "eager")
            inputs = make_inputs(self.model)
            self.heads = find_units(self.model, "head")
        self.model.double()
        oracle.randomise(self.model)
        self.inputs = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}

    def run(self):
        return oracle.answer(self.model(**self.inputs))

    def loss(self, *_):
        """A weighted sum of the answer, so that no gradient is zero by symmetry."""
        answer = self.run()
        weights = torch.randn(answer.shape, generator=torch.Generator().manual_seed(1), dtype=answer.dtype)
        return (answer * weights).sum()


small = functools.cache(Small)


def weight_of(model, reader):
    """The weight of what reads heads, its columns first."""
    weight = model.get_submodule(reader).weight
    return weight if isinstance(model.get_submodule(reader), transformers.pytorch_utils.Conv1D) else weight.T


def hooks(model):
    return {
        (name, kind): list(found.items())
        for name, module in model.named_modules()
        for kind, found in vars(module).items()
        if kind.endswith("_hooks") and isinstance(found, dict)
    }
