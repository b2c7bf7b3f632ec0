"""Calibration batches of every kind: padded, in either half of a model, shared, and under what a model sets for its thread."""

import pytest
import torch
from torch import nn
from transformers import BatchEncoding

import billhook as bh
from billhook.engine.statistics import InputNorms
from kit import prunes
from kit.families import llama, tokens
from kit.sparsity import Forked, family, masks_of

LENGTHS = [12, 7, 9, 3]


def padded(rows, side, value=0):
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), value), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def agree(one, other):
    return min((one[name] == other[name]).float().mean().item() for name in one)


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side, sequential):
    rows = [torch.randint(3, 60, (n,)) for n in LENGTHS]
    ids, mask = padded(rows, side)
    together, alone, ignored = llama(), None, None
    alone, ignored = (llama() for _ in range(2))
    alone.load_state_dict(together.state_dict())
    ignored.load_state_dict(together.state_dict())
    prunes.prune(together, bh.Wanda(), [{"input_ids": ids, "attention_mask": mask}], 0.5, sequential=sequential)
    prunes.prune(alone, bh.Wanda(), [{"input_ids": row[None]} for row in rows], 0.5, sequential=sequential)
    prunes.prune(ignored, bh.Wanda(), [{"input_ids": ids}], 0.5, sequential=sequential)
    assert agree(masks_of(together), masks_of(alone)) > 0.99
    assert agree(masks_of(together), masks_of(alone)) > agree(masks_of(ignored), masks_of(alone))


@pytest.mark.daily("*-t5")
@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("given", ["labels", "decoder_input_ids", "labels and mask"])
@pytest.mark.parametrize("targets", [[4, 8, 2, 6], [12, 5, 3, 9], [5, 12, 12, 2]])
def test_padding_of_encoder_and_decoder(name, given, targets):
    sources, targets = ([torch.randint(3, 60, (n,)) for n in lengths] for lengths in (LENGTHS, targets))
    ids, mask = padded(sources, "right")
    together, alone = family(name), family(name)
    together.config.decoder_start_token_id = alone.config.decoder_start_token_id = 0
    alone.load_state_dict(together.state_dict())

    def decoder(rows):
        filled, keep = padded(rows, "right", value=0 if given == "decoder_input_ids" else -100)
        if given == "labels":
            return {"labels": filled}
        if given == "labels and mask":
            return {"labels": filled, "decoder_attention_mask": keep}
        return {"decoder_input_ids": filled, "decoder_attention_mask": keep}

    prunes.prune(together, bh.Wanda(), [{"input_ids": ids, "attention_mask": mask, **decoder(targets)}], 0.5)
    singles = [{"input_ids": s[None], **decoder([t])} for s, t in zip(sources, targets, strict=True)]
    bh.prune(alone, bh.Wanda(), singles, 0.5)
    assert agree(masks_of(together), masks_of(alone)) > 0.99


def test_a_decoder_as_long_as_its_positions_go():
    model, ids = family("bart"), torch.randint(3, 60, (2, 64))
    assert model.config.max_position_embeddings == 64
    mask = torch.ones_like(ids)
    bh.prune(model, bh.Wanda(), [{"input_ids": ids, "attention_mask": mask, "labels": ids}], 0.5)
    mask[0, 40:] = 0
    bh.prune(model, bh.Wanda(), [{"input_ids": ids, "attention_mask": mask, "labels": ids}], 0.5)


def test_batches_in_every_form_are_the_same():
    ids, models = tokens(), [llama() for _ in range(5)]
    forms = [{"input_ids": ids}, ids, (ids,), [ids], BatchEncoding({"input_ids": ids})]
    for model, form in zip(models, forms, strict=True):
        model.load_state_dict(models[0].state_dict())
        bh.prune(model, bh.Wanda(), (batch for batch in [form]), 0.5)
    masks = [masks_of(model) for model in models]
    assert all(agree(masks[0], other) == 1 for other in masks)


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_linears_that_read_one_tensor_only_at_first(sequential):
    x, y, model = torch.randn(4, 16), torch.randn(4, 16) * torch.linspace(0, 9, 16), Forked()
    pruning = prunes.prune(model, bh.Wanda(), [(x,), (x, y)], 0.5, sequential=sequential, dry_run=True)
    for name, inputs in (("one", torch.cat([x, x])), ("two", torch.cat([x, y]))):
        norms = InputNorms(16)
        norms.add(inputs)
        assert torch.equal(pruning.masks(model)[name], bh.Wanda().prune(getattr(model, name).weight, norms, 0.5)[1])


class Positions(nn.Module):
    """As SEW-D's attention: queries read positions, too, which values do not."""

    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        query, value = self.query(x), self.value(x)
        return query @ self.query(x.flip(-1).cumsum(0)).mT @ value


@pytest.mark.parametrize("sequential", ["none", "layer"])
def test_one_that_is_called_again_alone_shares_no_statistics(sequential):
    torch.manual_seed(0)
    model, batches = Positions(), [torch.randn(2, 5, 8) for _ in range(2)]
    scores = model.value.weight.detach().abs() * torch.cat(batches).flatten(0, 1).norm(dim=0)
    prunes.prune(model, bh.Wanda(), batches, sparsity=0.5, sequential=sequential)
    assert torch.equal(model.value.weight != 0, scores >= scores.sort(1).values[:, 4:5])


class Ambient(nn.Module):
    """A model whose forward sets, for its blocks, what torch keeps for a whole thread."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.seen = []

    def forward(self, x):
        self.seen.append(torch.is_autocast_enabled("cpu"))
        with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
            for block in self.blocks:
                x = block(x)
                self.seen.append((torch.is_grad_enabled(), x.dtype))
        self.seen.append(torch.is_grad_enabled())
        return x


@pytest.mark.parametrize("sequential", ["block", "none"])
def test_runs_do_not_disturb_one_another(sequential):
    model = Ambient()
    prunes.prune(model, bh.SparseGPT(), [torch.randn(9, 16) for _ in range(3)], 0.5, sequential=sequential)
    assert {one for one in model.seen if isinstance(one, bool)} <= {False}
    assert {one for one in model.seen if isinstance(one, tuple)} == {(True, torch.bfloat16)}
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()


def test_statistics_and_solvers_are_in_float32_whatever_the_caller_has_set(monkeypatch):
    model, seen = llama(), []
    prune = bh.SparseGPT.prune
    monkeypatch.setattr(
        bh.SparseGPT, "prune", lambda self, w, stats, *rest: seen.append(stats.squares.dtype) or prune(self, w, stats, *rest)
    )
    plain = bh.prune(model, bh.SparseGPT(), [{"input_ids": tokens()}], 0.5, dry_run=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            low = bh.prune(model, bh.SparseGPT(), [{"input_ids": tokens()}], 0.5, dry_run=True)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert set(seen) == {torch.float32}
    assert plain.pruned.keys() == low.pruned.keys()


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_bf16_models(sequential):
    model = llama().to(torch.bfloat16)
    prunes.prune(model, bh.SparseGPT(), [{"input_ids": tokens()}], 0.5, sequential=sequential)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all((~mask).float().mean() >= 0.5 for mask in masks_of(model).values())


def test_labels_of_a_module_that_asks_for_them():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, labels):
            return self.linear(x + labels)

    bh.prune(Asks(), bh.Wanda(), [{"x": torch.ones(2, 4), "labels": torch.ones(2, 4)}], 0.5)


def test_inputs_embeds_and_four_dimensional_masks():
    model, batch = llama(), {"inputs_embeds": torch.randn(2, 5, 32), "attention_mask": torch.ones(2, 1, 5, 5).tril().bool()}
    bh.prune(model, bh.Wanda(), [batch], 0.5)
    assert all((~mask).float().mean() == 0.5 for mask in masks_of(model).values())


def test_a_key_value_cache_that_is_asked_for():
    ids, models = tokens(), [llama() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    bh.prune(models[0], bh.Wanda(), [{"input_ids": ids} for _ in range(2)], 0.5)
    bh.prune(models[1], bh.Wanda(), [{"input_ids": ids, "use_cache": True} for _ in range(2)], 0.5)
    assert agree(*map(masks_of, models)) == 1
