"""What a fit calibrates on: training's own examples, understood as training understands them, without a trace in it."""

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

import billhook as bh
from billhook.sparsity.criteria import Random
from kit.families import llama, tokens
from kit.fits import data, module, same, trainer, weights
from kit.weight_pruning import Plain, loader, pruning


class Batches(pl.Callback):
    """What training is given."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append([random.random(), torch.rand(1).item(), *torch.utils._pytree.tree_leaves(dict(batch))])


@pytest.mark.parametrize("criterion", [bh.Wanda(), bh.SparseGPT(), Random()])
def test_a_round_that_prunes_nothing_leaves_no_trace(files, tmp_path, criterion):
    """The same data in the same order, the same random numbers, the same weights bit for bit."""
    runs = []
    for callbacks in ([], [pruning(criterion, 0.0, at=0)], [pruning(criterion, 0.0, at=3, measure_batches=2)]):
        lit, watch = module(attention_dropout=0.3), Batches()
        torch.manual_seed(1)
        random.seed(1)
        trainer(tmp_path, [*callbacks, watch], accumulate_grad_batches=2).fit(lit, data(files))
        runs.append((weights(lit), watch.seen, random.random(), np.random.random(), torch.rand(1).item()))
        np.random.seed(5)
    for after in runs[1:]:
        if not isinstance(criterion, bh.SparseGPT):
            assert same(runs[0][0], after[0])
        assert len(runs[0][1]) == len(after[1]) == 16
        for one, other in zip(runs[0][1], after[1], strict=True):
            assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(one, other, strict=True))
        assert runs[0][2] == after[2]
        assert runs[0][4] == after[4]


def spied(lit, callback, loaders, folder, **options):
    """The batches that a round calibrates on, as the model is called with them."""
    seen = []

    def note(model, args, given):
        if not torch.is_grad_enabled() and "forward" not in vars(model):  # which finds out what a training step calls it with
            seen.append({name: value for name, value in given.items() if isinstance(value, torch.Tensor)})

    hook = lit.net.register_forward_pre_hook(note, with_kwargs=True)
    trainer(folder, [callback], max_steps=options.pop("max_steps", 2), **options).fit(lit, loaders)
    hook.remove()
    return seen


class Numbered(Dataset):
    """Rows of tokens that say which they are."""

    def __init__(self, rows=20):
        self.rows = torch.arange(rows)[:, None].expand(rows, 6).contiguous() + 3

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if index >= len(self.rows):
            raise IndexError(index)
        return self.rows[index], torch.ones(6, dtype=torch.long)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Numbered())


def rows_of(seen):
    return sorted(int(row[0]) - 3 for batch in seen for row in batch["input_ids"])


class Batched:
    """What is no DataLoader, but gives batches."""

    def __iter__(self):
        return iter(
            [torch.stack([part[i] for part in pair]) for i in (0, 1)] for pair in zip(*[iter(Numbered())] * 2, strict=True)
        )


class Lengths:
    """A batch sampler of a user's own, as for batches of like lengths."""

    def __iter__(self):
        return iter([[0, 1], [2], [3, 4, 5]])

    def __len__(self):
        return 3


LOADERS = {
    "shuffled": lambda: DataLoader(Numbered(), 2, shuffle=True),
    "workers": lambda: DataLoader(Numbered(), 2, num_workers=1),
    "batch sampler": lambda: DataLoader(Numbered(), batch_sampler=Lengths()),
    "subset": lambda: DataLoader(Numbered(), 2, sampler=SubsetRandomSampler([1, 3, 5, 7, 9, 11, 13])),
    "stream": lambda: DataLoader(Stream(), 2),
    "no DataLoader": Batched,
    "unbatched": lambda: DataLoader(Numbered(), batch_size=None, collate_fn=lambda pair: (pair[0][None], pair[1][None])),
}


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*fork", "ignore:The number of training batches")
@pytest.mark.parametrize("kind", LOADERS)
def test_examples_of_every_loader(tmp_path, kind):
    drawn = []
    for _ in range(2):
        lit = Plain()
        drawn.append(spied(lit, pruning(sparsity=0.5, at=1), LOADERS[kind](), tmp_path))
    rows = rows_of(drawn[0])
    assert len(rows) == 6
    assert rows == rows_of(drawn[1])
    if kind in ("stream", "no DataLoader"):
        assert rows == list(range(6))
    if kind == "subset":
        assert set(rows) < {1, 3, 5, 7, 9, 11, 13}
    assert all({"input_ids", "attention_mask"} <= batch.keys() for batch in drawn[0])


class Augmented(Numbered):
    """Rows that are never twice the same."""

    def __getitem__(self, index):
        noise = torch.randint(3, 60, (2,)).tolist() + [random.randrange(3, 60), int(np.random.randint(3, 60))]
        return torch.tensor([*noise, 3, 3]), torch.ones(6, dtype=torch.long)


def test_augmented_examples_are_the_same_after_a_resume(tmp_path):
    drawn = []
    for seed in (0, 1):
        lit = Plain()
        pl.seed_everything(seed, verbose=False)
        drawn.append(spied(lit, pruning(sparsity=0.5, at=1), DataLoader(Augmented(), 2, shuffle=True), tmp_path))
    for one, other in zip(*drawn, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


class Named(Plain):
    """Batches whose keys are the user's own, with more than the model takes."""

    def training_step(self, batch):
        self.log("example", float(batch["number"][0]))
        kept = self.net(inputs_embeds=self.net.model.embed_tokens(batch["words"]), attention_mask=batch["words"] > 5)
        return kept.logits.square().mean()


def test_a_batch_is_what_training_step_makes_of_it(tmp_path):
    words = tokens(16)
    rows = [{"words": row, "number": i} for i, row in enumerate(words)]
    seen = spied(Named(), pruning(sparsity=0.5, at=1), DataLoader(rows, 2), tmp_path)
    assert [set(batch) for batch in seen] == [{"inputs_embeds", "attention_mask"}] * 3


class Around(Plain):
    """Goes around the model's own forward."""

    def training_step(self, batch, batch_idx):
        ids, mask = batch
        hidden = self.net.model(ids, attention_mask=mask).last_hidden_state
        loss = self.net.lm_head(hidden).square().mean()
        self.log_dict({"loss": loss, "other": loss}, on_step=True, on_epoch=True, prog_bar=True)
        return loss


def test_a_step_that_goes_around_the_model(tmp_path):
    lit, callback = Around(), pruning(sparsity=0.5, at=1)
    run = trainer(tmp_path, [callback], max_steps=2)
    run.fit(lit, loader())
    assert len(callback.masks) == 14
    assert set(run.logged_metrics) == {"loss_step", "loss_epoch", "other_step", "other_epoch"}


class Several(Plain):
    def training_step(self, batch, batch_idx):
        (ids, mask), _ = batch["a"], batch["b"]
        return self.net(ids, attention_mask=mask, labels=ids).loss


@pytest.mark.parametrize("combined", [False, True])
def test_several_loaders(tmp_path, combined):
    loaders = {"a": DataLoader(Numbered(), 2), "b": DataLoader(TensorDataset(torch.ones(9)), 3)}
    given = CombinedLoader(loaders, "max_size_cycle") if combined else loaders
    assert len(rows_of(spied(Several(), pruning(sparsity=0.5, at=1), given, tmp_path))) in (4, 6)


class Moves(Plain):
    """Changes batches on their way."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + 10, batch[1]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + 10, batch[1]


def test_batches_are_moved_as_in_training(tmp_path):
    rows = rows_of(spied(Moves(), pruning(sparsity=0.5), DataLoader(Numbered(), 2), tmp_path))
    assert min(rows) >= 20


def test_padding_of_tuple_batches_does_not_count(tmp_path):
    ids, mask = tokens(16), torch.ones(16, 12, dtype=torch.long)
    mask[:, 7:] = 0
    masks = []
    for filler in (0, 40):
        filled = torch.where(mask.bool(), ids, filler)
        callback = pruning(sparsity=0.5)
        trainer(tmp_path, [callback], max_steps=1).fit(Plain(), DataLoader(TensorDataset(filled, mask), 2))
        masks.append(callback.masks)
    assert same(*masks)


class Once:
    """Reads a socket, as it were."""

    def __iter__(self):
        return self

    def __next__(self):
        return torch.full((2, 6), 3), torch.ones(2, 6, dtype=torch.long)


def test_data_that_can_be_read_only_once_is_refused_before_training(tmp_path):
    words = "calibration: examples come from the training data, but Once can be read only once. Pass batches"
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, [pruning(sparsity=0.5, at=2)], max_steps=3).fit(Plain(), Once())
    lit, batches = Plain(), [{"input_ids": tokens()}]
    trainer(tmp_path, [pruning(sparsity=0.5, at=2, calibration=batches)], max_steps=3).fit(lit, Once())
    trainer(tmp_path, [pruning(bh.Magnitude(), 0.5, at=2)], max_steps=3).fit(Plain(), Once())


@pytest.mark.parametrize("form", ["dictionaries", "tuples", "loader"])
def test_calibration_batches_of_ones_own(tmp_path, form):
    ids = tokens(8)
    given = {
        "dictionaries": [{"input_ids": part} for part in ids.split(4)],
        "tuples": [(part, torch.ones_like(part)) for part in ids.split(4)],
        "loader": DataLoader(TensorDataset(ids, torch.ones_like(ids)), 4, shuffle=True),
    }[form]
    callback = pruning(sparsity=bh.schedules.MultiStep([0.25, 0.5], [1, 2]), calibration=given)
    seen = spied(Plain(), callback, loader(), tmp_path, max_steps=3)
    assert sum(len(batch["input_ids"]) for batch in seen) == 2 * 8
    other = llama()
    other.load_state_dict(Plain().net.state_dict())
    callback = pruning(sparsity=0.5, calibration=given)
    trainer(tmp_path, [callback], max_steps=1).fit(Plain(), loader())
    expected = bh.prune(other, bh.Wanda(), [{"input_ids": part} for part in ids.split(4)], 0.5, dry_run=True).masks(other)
    assert min((mask == expected[name]).float().mean() for name, mask in callback.masks.items()) > 0.99


def test_calibration_batches_that_nobody_takes(tmp_path):
    callback = pruning(sparsity=0.5, calibration=["a text"])
    with pytest.raises(
        ValueError, match="calibration: training_step of Plain on batch 0, a str failed .* Pass batches as dictionaries"
    ):
        trainer(tmp_path, [callback], max_steps=1).fit(Plain(), loader())
