"""Small dense checkpoints to stream, and what is saved compared with what stands in memory."""

import torch
from small_configs import small_config

import billhook as bh
from kit import stopped


def written(kind, folder):
    """Writes a small random model of a class to a folder, and returns the folder."""
    torch.manual_seed(0)
    kind(small_config(kind.config_class)).eval().save_pretrained(folder)
    return folder


def same(folder, model):
    """Tells whether a folder holds just the tensors of a model."""
    found, expected = bh.load(folder).state_dict(), model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], one) for name, one in expected.items())


def given(model):
    """Batches that a model takes, one of them padded."""
    batches = [{"input_ids": batch["input_ids"][:, :24] % 99} for batch in stopped.batches()]
    batches[1]["attention_mask"] = torch.ones(1, 24, dtype=torch.long)
    batches[1]["attention_mask"][:, 20:] = 0
    both = model.config.is_encoder_decoder
    return [batch | {"decoder_input_ids": batch["input_ids"][:, :9]} for batch in batches] if both else batches


def check_the_same(folder, tmp_path, importance, **amounts):
    """Removes the same from a folder that is streamed and from one in memory, and compares what is chosen and saved."""
    dense, streamed = bh.load(folder), bh.stream(folder, tmp_path / "out")
    plans = [bh.plan(model, importance, given(dense), **amounts) for model in (dense, streamed)]
    assert plans[0].to_json() == plans[1].to_json()
    assert plans[0].units
    for model, plan in zip((dense, streamed), plans, strict=True):
        bh.apply(model, plan)
    assert bh.save(streamed, tmp_path / "out").way == bh.save(dense, tmp_path / "in memory").way
    assert same(tmp_path / "out", bh.load(tmp_path / "in memory"))
