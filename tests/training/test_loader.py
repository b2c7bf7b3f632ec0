"""The place in the data: orders, shards, and resuming to exactly the batches that a straight run sees."""

import random
from itertools import islice

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from transformers import AutoTokenizer

from billhook.assets import model_path
from billhook.training.data import TextDataModule
from billhook.training.loader import EpochSampler, ResumableLoader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*across ranks is zero"),
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]

BLOCKS = 26  # of four tokens; 13 batches


def first_column(batch):
    return tuple(batch["input_ids"][:, 0].tolist())


class Recorder(pl.LightningModule):
    """Remembers the batches it saw."""

    def __init__(self, ask=False, fail_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.ask, self.fail_at, self.seen, self.asked, self.validated = ask, fail_at, [], None, []

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.fail_at:
            raise RuntimeError("power cut")
        self.seen.append(tuple(map(tuple, batch["input_ids"].tolist())))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(tuple(map(tuple, batch["input_ids"].tolist())))

    def configure_optimizers(self):
        if self.ask:
            self.asked = self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Saves after so many batches, as ModelCheckpoint(every_n_train_steps) does."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


class AskInSetup(Callback):
    """Asks for the length of training before the checkpoint is read."""

    def setup(self, trainer, pl_module, stage):
        if stage == "fit":
            _ = trainer.estimated_stepping_batches


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny"))
    words, draw = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "red", "bird"], random.Random(0)
    long = " ".join(draw.choice(words) + str(draw.randrange(99)) for _ in range(200))
    ids = tokenizer(long, add_special_tokens=False)["input_ids"][: 4 * BLOCKS]
    short = tokenizer.decode(ids)
    assert len(tokenizer(short, add_special_tokens=False)["input_ids"]) == 4 * BLOCKS
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text(short)
    return str(path)


@pytest.fixture
def make(text):
    def make(**options):
        return TextDataModule(data={"train": text}, tokenizer="tiny", length=4, batch_size=2, **options)

    return make


def fit(data, module=None, ckpt_path=None, callbacks=(), **options):
    module = module or Recorder()
    options = {"max_epochs": 3, "enable_checkpointing": False} | options
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=False)
    return module, trainer


@pytest.mark.daily("False-False-0-5", "True-True-0-13", "True-False-0-26", "False-True-0-18", "False-True-2-5", "True-True-2-18")
@pytest.mark.parametrize(
    ("streaming", "ask", "num_workers", "stop"),
    [
        *((streaming, ask, 0, stop) for streaming in (False, True) for ask in (False, True) for stop in (5, 13, 18, 26)),
        (False, False, 2, 18),
        (False, True, 2, 5),
        (True, False, 2, 5),
        (True, True, 2, 18),
    ],
)
def test_resume(make, tmp_path, streaming, ask, num_workers, stop):
    options = {"streaming": streaming, "num_workers": num_workers}
    straight, _ = fit(make(**options), Recorder(ask), callbacks=[SaveAt(tmp_path / "a.ckpt", stop)])
    assert len(straight.seen) == 39
    resumed, _ = fit(make(**options), Recorder(ask), ckpt_path=tmp_path / "a.ckpt")
    assert resumed.seen == straight.seen[stop:]
    if ask and not streaming:
        assert resumed.asked == straight.asked == 39


@pytest.mark.parametrize(("streaming", "stop", "max_epochs"), [(False, 5, 9), (False, 13, -1), (True, 18, 9), (True, 13, -1)])
def test_max_steps_stops_and_a_later_fit_goes_on(make, tmp_path, streaming, stop, max_epochs):
    def run(max_steps, ckpt_path=None):
        # with max_epochs, the length of training is asked of a loader
        module = Recorder(ask=max_epochs > 0)
        return fit(make(streaming=streaming), module, ckpt_path, max_epochs=max_epochs, max_steps=max_steps)

    straight, _ = run(39)
    first, trainer = run(stop)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second, _ = run(39, tmp_path / "a.ckpt")
    assert first.seen + second.seen == straight.seen


@pytest.mark.parametrize(("streaming", "stop"), [(False, 4), (False, 6), (True, 7)])
def test_resume_with_limit_train_batches(make, tmp_path, streaming, stop):
    limited = {"limit_train_batches": 6}
    straight, _ = fit(make(streaming=streaming), callbacks=[SaveAt(tmp_path / "a.ckpt", stop)], **limited)
    assert len(straight.seen) == 18
    resumed, _ = fit(make(streaming=streaming), ckpt_path=tmp_path / "a.ckpt", **limited)
    assert resumed.seen == straight.seen[stop:]


@pytest.mark.parametrize(("streaming", "ask"), [(False, True), (True, False)])
def test_resume_from_a_finished_fit(make, tmp_path, streaming, ask):
    straight, _ = fit(make(streaming=streaming), Recorder(ask))
    first, trainer = fit(make(streaming=streaming), Recorder(ask), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second, _ = fit(make(streaming=streaming), Recorder(ask), ckpt_path=tmp_path / "a.ckpt")
    assert first.seen + second.seen == straight.seen


@pytest.mark.parametrize(("streaming", "stop"), [(False, 13), (True, 18)])
def test_a_resumed_fit_that_saves_before_its_first_batch(make, tmp_path, streaming, stop):
    class SaveAtOnce(Callback):
        def on_train_start(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "b.ckpt")

    straight, _ = fit(make(streaming=streaming), callbacks=[SaveAt(tmp_path / "a.ckpt", stop)])
    fit(make(streaming=streaming), ckpt_path=tmp_path / "a.ckpt", callbacks=[SaveAtOnce()], limit_train_batches=13)
    places = [torch.load(tmp_path / name, weights_only=False)["TextDataModule"] for name in ("a.ckpt", "b.ckpt")]
    assert places[0] == places[1]
    resumed, _ = fit(make(streaming=streaming), ckpt_path=tmp_path / "b.ckpt")
    assert resumed.seen == straight.seen[stop:]


@pytest.mark.parametrize("streaming", [False, True])
def test_resume_when_the_length_was_asked_before_the_checkpoint_was_read(make, tmp_path, streaming):
    straight, _ = fit(make(streaming=streaming), callbacks=[SaveAt(tmp_path / "a.ckpt", 18)])
    resumed, _ = fit(make(streaming=streaming), ckpt_path=tmp_path / "a.ckpt", callbacks=[AskInSetup()])
    assert resumed.seen == straight.seen[18:]


def test_resume_with_model_checkpoint_and_validation(make, text, tmp_path):
    def data():
        return TextDataModule({"train": text, "validation": text}, "tiny", length=4, batch_size=2)

    def run(max_epochs, **options):
        saver = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
        options |= {"enable_checkpointing": True, "val_check_interval": 4, "limit_val_batches": 2}
        return fit(data(), callbacks=[saver], max_epochs=max_epochs, num_sanity_val_steps=1, **options)[0]

    first = run(1)
    second = run(2, ckpt_path=tmp_path / "last.ckpt")
    straight, _ = fit(data(), max_epochs=2)
    # the last validation, and so the last checkpoint, is after batch 12 of 13
    assert first.seen[:12] + second.seen == straight.seen


def test_a_batch_that_failed_is_seen_again(make, tmp_path):
    class SaveOnException(Callback):
        def on_exception(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    straight, _ = fit(make())
    first = Recorder(fail_at=16)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(make(), first, callbacks=[SaveOnException()])
    resumed, _ = fit(make(), ckpt_path=tmp_path / "a.ckpt")
    assert first.seen + resumed.seen == straight.seen


def test_resume_with_accumulated_gradients(make, tmp_path):
    straight, _ = fit(make(), accumulate_grad_batches=2, callbacks=[SaveAt(tmp_path / "a.ckpt", 9)])
    resumed, _ = fit(make(), accumulate_grad_batches=2, ckpt_path=tmp_path / "a.ckpt")
    assert resumed.seen == straight.seen[-len(resumed.seen) :]
    assert len(resumed.seen) == 39 - 17  # the seventh step of an epoch takes one batch


def test_a_second_fit_of_one_trainer_goes_on_with_the_next_epoch(make):
    straight, _ = fit(make())
    data = make()
    module, trainer = fit(data, max_epochs=1)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, datamodule=data)
    assert module.seen == straight.seen


def test_evaluating_a_checkpoint_does_not_move_a_later_fit(text, tmp_path):
    def make():
        return TextDataModule({"train": text, "validation": text}, "tiny", length=4, batch_size=2)

    straight, _ = fit(make(), limit_val_batches=0, callbacks=[SaveAt(tmp_path / "a.ckpt", 5)])
    data, module = make(), Recorder()
    evaluator = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    evaluator.validate(module, datamodule=data, ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=False)
    assert len(module.validated) == 13
    assert fit(data, limit_val_batches=0)[0].seen == straight.seen


@pytest.mark.nightly
def test_order_depends_on_seed_and_epoch(make):
    def epochs(seed, **options):
        return [fit(make(seed=seed, **options))[0].seen[i : i + 13] for i in (0, 13, 26)]

    for options in ({}, {"streaming": True}):
        first, again, other = epochs(0, **options), epochs(0, **options), epochs(1, **options)
        assert first == again
        assert first[0] != first[1] != first[2] != first[0]
        assert other[0] not in first
        assert len({frozenset(block for batch in epoch for block in batch) for epoch in first + other}) == 1


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("epoch", [0, 1])
def test_ranks_share_the_training_examples(world, epoch):
    shares = []
    for rank in range(world):
        sampler = EpochSampler(range(26), world, rank, shuffle=True, seed=3, drop_last=True)
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
    assert {len(share) for share in shares} == {26 // world}
    together = [i for share in shares for i in share]
    assert len(set(together)) == len(together) == 26 // world * world


def test_ranks_pad_the_validation_examples():
    shares = [list(EpochSampler(range(5), 2, rank, shuffle=False, drop_last=False)) for rank in range(2)]
    assert shares == [[0, 2, 4], [1, 3, 0]]


class Stub:
    """As much of a trainer as loaders look at."""

    current_epoch, world_size = 0, 2

    def __init__(self, rank):
        self.global_rank = rank
        self.fit_loop = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit_loop


@pytest.mark.parametrize("streaming", [False, True])
def test_ranks_of_a_data_module(make, text, streaming):
    blocks = []
    for rank in range(2):
        data = make(streaming=streaming)
        data.setup("fit")
        data.trainer = Stub(rank)
        blocks.append([tuple(row) for batch in data.train_dataloader() for row in batch["input_ids"].tolist()])
    assert len(blocks[0]) == len(blocks[1]) == 12  # thirteen blocks each, of which one does not fill a batch
    assert not set(blocks[0]) & set(blocks[1])
    whole = make()
    whole.setup("fit")
    assert set(blocks[0] + blocks[1]) < {tuple(row) for row in whole.splits["train"]["input_ids"]}


def test_without_a_trainer_each_iteration_is_an_epoch(make):
    data = make()
    data.setup("fit")
    loader = data.train_dataloader()
    first, second = list(map(first_column, loader)), list(map(first_column, loader))
    assert first != second
    again = data.train_dataloader()
    assert list(map(first_column, again)) == first


def test_an_iterator_that_is_dropped_unused_is_no_epoch(make):
    data = make()
    data.setup("fit")
    loader = data.train_dataloader()
    iter(loader)
    first = list(islice(loader, 2))
    assert loader.epoch == 0
    assert list(map(first_column, first)) == list(map(first_column, islice(data.train_dataloader(), 2)))


def test_loader_begins_at_a_batch_of_an_epoch():
    def loader(**place):
        sampler = EpochSampler(range(20), 1, 0, shuffle=True, seed=0, drop_last=True)
        return ResumableLoader(range(20), sampler=sampler, batch_size=3, drop_last=True, **place)

    straight = loader()
    epochs = [[batch.tolist() for batch in straight] for _ in range(3)]
    assert len(straight) == 6
    assert all(len(epoch) == 6 for epoch in epochs)
    resumed = loader(epoch=1, batch=4)
    assert [batch.tolist() for batch in resumed] == epochs[1][4:]
    assert [batch.tolist() for batch in resumed] == epochs[2]
