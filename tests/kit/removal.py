"""Models whose heads can be removed, and what a removal must leave."""

import inspect
import random
import warnings

import oracle
import pytest
import torch
import transformers
from small_configs import architectures, has_experts, small_config
from small_configs import build as small

import billhook as bh
from billhook.model import surgery
from billhook.model.inputs import make_inputs
from billhook.model.shape import shape_of
from billhook.pruning import removal
from billhook.pruning.cut import coupled_modules
from billhook.units.find import find_units
from kit.families import llama, tokens
from kit.shaped import gpt2

ALIKE = ("phi3",)  # whose code asks the config how many heads there are, so that layers may not differ


def make(name, **changes):
    """A small model in float64 with every parameter random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        config_class, model_class = next(architectures(name))[2:]
        config = small_config(config_class, **changes)
        model = small(config, model_class, "batched_mm" if has_experts(config) else "eager").double()
    oracle.randomise(model)
    return model


def counts(model):
    return {name: (one.count(), one.count("kv_head")) for name, one in find_units(model, "head").items()}


def some_heads(heads, alike=False, whole=True):
    """Other heads in each layer, another number of them unless all are to be alike: whole KV heads in the first of two layers."""
    chosen = {}
    for number, names in enumerate(coupled_modules(heads)):
        one, rng = heads[names[0]], random.Random(number)
        query, kv = one.count(), one.count("kv_head")
        size = query // kv
        if 1 < kv < query and whole and (alike or number % 2 == 0):
            own = [head for head in range(query) if one.kv_of[head] == number % kv]
        elif size > 1:
            lost = 1 if alike else 1 + (number + 1) % (size - 1)
            own = [kv_head * size + place for kv_head in range(kv) for place in rng.sample(range(size), lost)]
        else:
            own = rng.sample(range(query), 1 if alike else 1 + number % (query - 1))
        chosen |= dict.fromkeys(names, sorted(own))
    return chosen


def questions(model):
    """Inputs of several sizes; of texts also padded at the left and at the right."""
    found = []
    for batch, length in ((1, 5), (3, 12), (2, 8)):
        inputs = make_inputs(model, batch, length)
        if model.main_input_name == "input_ids" and batch > 1:
            mask = torch.ones(batch, length, dtype=torch.long)
            mask[0, : length // 2] = 0
            mask = mask if batch == 3 else mask.flip(1)
            inputs["attention_mask"] = mask
            if "decoder_attention_mask" in inspect.signature(model.forward).parameters:
                inputs["decoder_attention_mask"] = torch.ones(batch, 5, dtype=torch.long)
                inputs["decoder_attention_mask"][1, 3:] = 0
        found.append({k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()})
    return found


class TestNothingIsHalfDone:
    @staticmethod
    def everything(model, optimizer):
        """All that could change, by identity and by value."""
        return {
            "tensors": {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()},
            "buffers": {name: (id(b), b.clone().tolist()) for name, b in model.named_buffers()},
            "values": {name: p.detach().clone().tolist() for name, p in model.named_parameters()},
            "gradients": {name: id(p.grad) for name, p in model.named_parameters()},
            "shape": shape_of(model),
            "config": model.config.to_dict(),
            "groups": [{**g, "params": [id(p) for p in g["params"]]} for g in optimizer.param_groups],
            "state": {id(p): {k: (id(v), v.clone().tolist()) for k, v in own.items()} for p, own in optimizer.state.items()},
            "modes": [module.training for module in model.modules()],
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
            "attributes": {name: {k: v for k, v in vars(m).items() if isinstance(v, int | tuple | str)}
                           for name, m in model.named_modules()},
        }  # fmt: skip

    @staticmethod
    def trained(model):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        return model, optimizer

    CHOSEN = {"llama": {0: [0, 1], 1: [2, 3]}, "gpt2": {1: [0]}}

    @pytest.mark.parametrize(("where", "call"), [("change_values", 1), ("set_shape", 1), ("set_fields", 1), ("run_outputs", 2)])
    def test_an_error_in_the_middle(self, where, call, monkeypatch):
        model, optimizer = self.trained(llama())
        before = self.everything(model, optimizer)
        place = surgery if where == "change_values" else removal
        real, calls = getattr(place, where), []

        def fails(*args):
            calls.append(args)
            if len(calls) == call:
                raise KeyError("in the middle")
            return real(*args)

        monkeypatch.setattr(place, where, fails)
        with pytest.raises(KeyError, match="in the middle"):
            bh.pruning.prune_units(model, self.CHOSEN["llama"], optimizer)
        assert self.everything(model, optimizer) == before
        self.goes_on(model, optimizer, "llama")

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_code_that_does_not_follow(self, name, monkeypatch):
        model, optimizer = self.trained({"llama": llama, "gpt2": gpt2}[name]())
        before = self.everything(model, optimizer)
        monkeypatch.setattr(removal, "outputs_match", lambda *_: False)
        with pytest.raises(ValueError, match="its forward pass does not work"):
            bh.pruning.prune_units(model, self.CHOSEN[name], optimizer)
        assert self.everything(model, optimizer) == before
        monkeypatch.undo()
        self.goes_on(model, optimizer, name)

    def goes_on(self, model, optimizer, name):
        """As if nothing had been tried."""
        optimizer.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        bh.pruning.prune_units(model, self.CHOSEN[name], optimizer)

    def test_weights_that_are_not_finite_stay_so(self):
        model = llama()
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight[0] = float("nan")
        bh.pruning.prune_units(model, {1: [0, 1]})
        assert counts(model)["model.layers.1.self_attn"] == (6, 3)
