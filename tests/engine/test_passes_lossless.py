"""What needs no gradient runs on models that give no loss, and says the same as on those that do."""

import pytest
import torch
import transformers

import billhook as bh
from kit.families import BERT, VIT, tokens

NO_LOSS = {
    "a plain encoder": lambda: transformers.BertModel(transformers.BertConfig(**BERT)),
    "a masked language model": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**BERT)),
    "a classifier of images": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)),
}


@pytest.fixture(params=NO_LOSS)
def subject(request):
    torch.manual_seed(0)
    model = NO_LOSS[request.param]().eval()
    images = model.main_input_name == "pixel_values"
    batches = [{"pixel_values": torch.randn(32, 3, 8, 8)} if images else {"input_ids": tokens(8)} for _ in range(3)]
    return model, batches


@pytest.mark.daily("*-as it is-svd", "*-repaired-auto")
@pytest.mark.parametrize("method", ["mean", "svd", "aligned", "auto"])
@pytest.mark.parametrize("repair", [None, bh.RepairConfig()], ids=["as it is", "repaired"])
def test_kv_heads_by_every_method(subject, method, repair):
    model, batches = subject
    heads = model.config.num_attention_heads
    assert bh.convert_kv_heads(model, heads // 2, method, batches, repair=repair).before == heads


@pytest.mark.parametrize(
    "importance", [bh.OutputNorm(), bh.importance.ActivationNorm(), bh.OBS(), bh.importance.BlockInfluence()], ids=str
)
def test_scores_without_gradients(subject, importance):
    model, batches = subject
    units = bh.find_units(model, "block" if isinstance(importance, bh.importance.BlockInfluence) else "channel")
    found = bh.score(model, units, importance, batches)
    labelled = type(model).__name__ == "ViTForImageClassification"
    given = [one | {"labels": torch.zeros(32, dtype=torch.long)} for one in batches] if labelled else batches
    again = bh.score(model, units, importance, given)
    assert all(torch.equal(own, again[name]) for name, own in found.items())


def test_units_are_removed_and_made_up_for(subject):
    model, batches = subject
    plan = bh.plan(model, bh.OutputNorm(), batches, channels=0.25)
    bh.apply(model, plan, weights=bh.repair(model, plan, batches))


def test_what_needs_a_loss_says_what_it_takes(subject):
    model, batches = subject
    with pytest.raises(ValueError, match="returns no loss for inputs .*. Add labels, or pass loss="):
        bh.score(model, bh.find_units(model, "head"), bh.Taylor(), batches)
    bh.score(
        model, bh.find_units(model, "head"), bh.Taylor(), batches, loss=lambda model, batch: model(**batch)[0].square().mean()
    )


def test_batches_that_no_model_takes(subject):
    model, _ = subject
    with pytest.raises(ValueError, match="a str is not a dictionary, tuple, list, or tensor"):
        bh.convert_kv_heads(model, 1, "svd", ["text"])
