"""Tokens that are removed in a fit: batches of the event's and all further steps, resume, and the tokenizer that is saved."""

import lightning.pytorch as pl
import pytest
import torch
import transformers

import billhook as bh
from billhook.model.preprocessors import load_tokenizer
from kit.fits import data, module, same, trainer, weights
from kit.trainers import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
]


class Seen(pl.Callback):
    """The batches that the model takes, and the size of its vocabulary."""

    def __init__(self):
        self.batches, self.sizes = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append({name: value.clone() for name, value in batch.items()})
        self.sizes.append(pl_module.model.config.vocab_size)


def pruning(**options):
    return bh.StructuredPruning(bh.Amount(tokens=0.3), **{"calibration": 6, "measure_batches": 0} | options)


WHEN = {"start": {}, "a step": {"at": 3}, "rounds": {"at": 2, "rounds": 2}}


@pytest.mark.parametrize("when", WHEN)
def test_all_further_batches_are_in_the_tokens_that_are_left(files, tmp_path, when):
    plain, seen, lit = Seen(), Seen(), module()
    trainer(tmp_path, [plain]).fit(module(), data(files))
    loader, dense = data(files), load_tokenizer("tiny")
    callbacks = [pruning(**WHEN[when]), bh.Export(str(tmp_path / "out")), seen]
    trainer(tmp_path, callbacks).fit(lit, loader)
    step = WHEN[when].get("at", 0)
    left = lit.model.config.vocab_size
    assert seen.sizes == [2048] * step + [left] * (8 - step)
    assert (when == "rounds") or left == 1408
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(saved) == again.config.vocab_size == left
    assert loader.tokenizer.get_vocab() == saved.get_vocab()
    for number, (batch, before) in enumerate(zip(seen.batches, plain.batches, strict=True)):
        assert batch["input_ids"].shape == before["input_ids"].shape
        assert torch.equal(batch["labels"], batch["input_ids"])
        tokenizer = dense if number < step else saved
        for ids, old in zip(batch["input_ids"], before["input_ids"], strict=True):
            assert dense.decode(old).startswith(tokenizer.decode(ids))
    assert all(torch.isfinite(value).all() for value in weights(lit).values())


@pytest.mark.parametrize("after", [2, 6])
def test_a_run_that_is_resumed_ends_as_one_that_is_not(files, tmp_path, after):
    def callbacks(seen):
        return [pruning(at=4), pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1), seen]

    straight, lit = Seen(), module(tie_word_embeddings=True, pad_token_id=3, eos_token_id=5)
    trainer(tmp_path, callbacks(straight)).fit(lit, data(files))
    resumed, seen = module(1, tie_word_embeddings=True, pad_token_id=3, eos_token_id=5), Seen()
    trainer(tmp_path / "again", [pruning(at=4), seen]).fit(resumed, data(files), ckpt_path=tmp_path / f"step={after}.ckpt")
    assert seen.sizes == straight.sizes[after:]
    for batch, expected in zip(seen.batches, straight.batches[after:], strict=True):
        assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert same(weights(resumed), weights(lit))
    assert resumed.model.config.to_dict() == lit.model.config.to_dict()
    assert resumed.model.generation_config.to_dict() == lit.model.generation_config.to_dict()


def test_what_has_no_way_to_follow_is_refused(files, tmp_path):
    loader = data(files)
    loader.setup("fit")
    with pytest.raises(ValueError, match="if they come from bh.TextDataModule or another data module .*not from loaders"):
        trainer(tmp_path, [pruning()]).fit(module(), loader.train_dataloader(), loader.val_dataloader())
    with pytest.raises(
        ValueError, match="tokens cannot be combined with Degradation, whose texts are in the tokens of the dense"
    ):
        trainer(tmp_path, [bh.callbacks.Degradation(bh.Calibration("tiny", tokens=64, length=16)), pruning()]).fit(
            module(), data(files)
        )
    with pytest.raises(ValueError, match="masked tokens do not follow to a smaller vocabulary"):
        trainer(tmp_path, [pruning()]).fit(module(), data(files, mlm_probability=0.2))


def test_transformers_trainer_has_no_batches_that_follow(tmp_path):
    with pytest.raises(ValueError, match="the batches of this trainer do not follow to a smaller vocabulary"):
        train(tmp_path, [pruning()])
