"""What Export saves along, verifies with, rehearses, and keeps where it fails."""

import functools
import logging
import re

import lightning.pytorch as pl
import pytest
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import billhook as bh
from billhook.assets import model_path
from billhook.checkpoints.export import export
from billhook.checkpoints.push import push
from kit.events import SIZES, loader
from kit.families import VIT, llama
from kit.fits import data, module, trainer
from kit.hub import hub, to_hub

IDS = torch.randint(3, 60, (8, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path("tiny"))


class Plain(pl.LightningModule):
    """A module of a user's own of any model."""

    def __init__(self, net):
        super().__init__()
        self.net = net.train()

    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


class Own(Plain):
    """One of a Llama."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(llama(**SIZES, vocab_size=2048))


def fit(folder, lit, rows, max_steps=2, more=(), **options):
    callback = bh.Export(str(folder / "out"), **options)
    trainer(folder, [*more, callback], max_steps=max_steps).fit(lit, rows)
    return callback


def rows_of(tensors, **options):
    return DataLoader(
        [dict(zip(tensors, row, strict=True)) for row in zip(*tensors.values(), strict=True)], batch_size=2, **options
    )


def words_in(folder):
    return AutoTokenizer.from_pretrained(folder / "out")("to be")["input_ids"]


class TestProbe:
    def test_one_that_is_given(self, tmp_path):
        class Other(Own):
            def training_step(self, batch, batch_idx):
                return self.net(batch[0], labels=batch[0]).loss

        seen, lit = [], Other()
        lit.net.register_forward_pre_hook(lambda _, args, options: seen.append(options.get("input_ids")), with_kwargs=True)
        probe = {"input_ids": torch.tensor([[5, 6, 7]])}
        fit(tmp_path, lit, DataLoader(torch.utils.data.TensorDataset(IDS), batch_size=2), probe=probe)
        assert any(one is not None and torch.equal(one, probe["input_ids"]) for one in seen)

    def test_it_is_an_example_of_the_first_batch(self, tmp_path):
        seen, lit = [], Own()
        lit.net.register_forward_pre_hook(lambda _, args, options: seen.append(options), with_kwargs=True)
        fit(tmp_path, lit, loader(), max_steps=1)
        first = next(iter(loader()))
        assert torch.equal(seen[0]["input_ids"], first["input_ids"][:1])  # rehearsed before the first step
        assert "labels" not in seen[0]
        assert torch.equal(seen[1]["input_ids"], first["input_ids"])


class TestRehearsal:
    def test_what_cannot_be_saved_costs_no_training(self, tmp_path):
        lit = Own()
        lit.net.config.hidden_act = "relu"
        with pytest.raises(ValueError, match="Export: the trial export before training failed"):
            fit(tmp_path / "a", lit, loader())
        assert lit.global_step == 0
        assert not (tmp_path / "a").exists() or [*(tmp_path / "a").iterdir()] == []

    def test_it_leaves_nothing_and_changes_nothing(self, tmp_path):
        found = []
        for rehearse in (True, False):
            torch.manual_seed(0)
            lit = Own()
            fit(tmp_path / str(rehearse), lit, loader(), rehearse=rehearse)
            found.append((lit.state_dict(), torch.get_rng_state()))
            assert [one.name for one in (tmp_path / str(rehearse)).iterdir() if "rehearsal" in one.name] == []
        assert all(torch.equal(one, found[1][0][name]) for name, one in found[0][0].items())
        assert torch.equal(found[0][1], found[1][1])


class Break(pl.Callback):
    """Computes something else at the end than the config says."""

    def on_train_end(self, trainer, pl_module):
        pl_module.net.config.hidden_act = "relu"


def test_a_failing_export_keeps_the_weights(tmp_path):
    lit = Own()
    with (
        pytest.raises(RuntimeError),
        pytest.warns(UserWarning, match=r"Export failed\. The unverified weights are in .*out-unverified"),
    ):
        fit(tmp_path, lit, loader(), more=[Break(), bh.KVHeadConversion(1, at=1, measure_batches=0)])
    kept = tmp_path / "out-unverified"
    assert not (tmp_path / "out").exists()
    assert "final weights, not verified" in (kept / "UNVERIFIED.txt").read_text()
    state = torch.load(kept / "weights.ckpt")["state_dict"]
    assert all(torch.equal(one, state[name]) for name, one in lit.net.state_dict().items())


def test_kept_weights_can_be_exported(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("no room")

    lit, match = Own(), r"Export failed\. The unverified weights are in .*out-unverified"
    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", fails)
        with pytest.raises(OSError, match="no room"), pytest.warns(UserWarning, match=match):
            fit(tmp_path, lit, loader(), more=[bh.KVHeadConversion(1, at=1, measure_batches=0)], rehearse=False)
    export(tmp_path / "out-unverified" / "weights.ckpt", tmp_path / "again")
    again = bh.load(tmp_path / "again").eval()
    assert again.config.num_key_value_heads == 1
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, lit.net.eval()(IDS).logits)


COLLATED = AutoTokenizer.from_pretrained(model_path("tiny"))


def by_a_global(rows):
    assert COLLATED
    return torch.utils.data.default_collate(rows)


def collates(tokenizer, rows):
    return torch.utils.data.default_collate(rows)


class Collator:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, rows):
        return torch.utils.data.default_collate(rows)


class TestTokenizer:
    @pytest.mark.parametrize("way", ["closure", "partial", "object", "global", "method"])
    def test_of_a_loader(self, tmp_path, tokenizer, way):
        ways = {
            "closure": lambda rows: collates(tokenizer, rows),
            "partial": functools.partial(collates, tokenizer),
            "object": Collator(tokenizer),
            "global": by_a_global,
            "method": Collator(tokenizer).__call__,
        }
        fit(tmp_path, Own(), rows_of({"input_ids": IDS, "labels": IDS}, collate_fn=ways[way]))
        assert words_in(tmp_path) == tokenizer("to be")["input_ids"]

    def test_of_a_data_set(self, tmp_path, tokenizer):
        class Rows(torch.utils.data.Dataset):
            def __init__(self):
                self.tokenizer = tokenizer

            def __len__(self):
                return 8

            def __getitem__(self, place):
                return {"input_ids": IDS[place], "labels": IDS[place]}

        fit(tmp_path, Own(), DataLoader(torch.utils.data.Subset(Rows(), range(6)), batch_size=2))
        assert words_in(tmp_path) == tokenizer("to be")["input_ids"]

    def test_of_the_module_and_of_a_data_module(self, tmp_path, tokenizer):
        lit = Own()
        lit.words = tokenizer
        fit(tmp_path / "module", lit, loader())
        assert words_in(tmp_path / "module") == tokenizer("to be")["input_ids"]

        class Data(pl.LightningDataModule):
            def __init__(self):
                super().__init__()
                self.preparing = Collator(tokenizer)

            def train_dataloader(self):
                return loader()

        fit(tmp_path / "data", Own(), Data())
        assert words_in(tmp_path / "data") == tokenizer("to be")["input_ids"]

    def test_where_the_model_came_from(self, tmp_path, tokenizer):
        fit(tmp_path, Plain(bh.load("tiny").float()), loader())
        assert words_in(tmp_path) == tokenizer("to be")["input_ids"]

    @pytest.mark.parametrize("way", ["name", "itself"])
    def test_given(self, tmp_path, tokenizer, way):
        fit(tmp_path, Own(), loader(), tokenizer={"name": "tiny", "itself": tokenizer}[way])
        assert words_in(tmp_path) == tokenizer("to be")["input_ids"]

    def test_of_images(self, tmp_path):
        prepare = transformers.ViTImageProcessor(size={"height": 24, "width": 24})
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT))
        size = model.config.image_size
        lit = Plain(model)
        lit.prepare = prepare
        fit(tmp_path, lit, rows_of({"pixel_values": torch.randn(4, 3, size, size), "labels": torch.tensor([0, 1, 1, 0])}))
        assert transformers.AutoImageProcessor.from_pretrained(tmp_path / "out").size["height"] == 24

    def test_none(self, tmp_path):
        with pytest.warns(
            UserWarning, match="no tokenizer or processor was found in the data module, .* so none is saved to .*out"
        ):
            fit(tmp_path, Own(), loader())
        llama().save_pretrained(tmp_path / "bare")  # from which transformers makes an empty tokenizer
        with pytest.warns(UserWarning, match="no tokenizer or processor was found"):
            fit(tmp_path, Plain(bh.load(tmp_path / "bare")), loader())

    def test_billhooks_own_module_and_data(self, files, tmp_path, tokenizer):
        callback = bh.Export(str(tmp_path / "out"))
        trainer(tmp_path, [callback], max_steps=1).fit(module(), data(files))
        assert words_in(tmp_path) == tokenizer("to be")["input_ids"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tokenizer": 3}, "tokenizer=3 must be a PreTrainedTokenizerBase or a ProcessorMixin or .* or a string or None"),
        ({"probe": [1]}, r"probe=\[1\] must be a Mapping\[str, Any\] or None"),
        ({"probe": {}}, r"probe=\{\} must be a dictionary of forward inputs"),
        ({"push_to_hub": "cut"}, "push_to_hub='cut' must be the name of a Hub repository, such as 'user/name'"),
        ({"push_to_hub": "some one/cut"}, "push_to_hub='some one/cut' must be the name of a Hub repository"),
        ({"push_to_hub": 3}, "push_to_hub=3 must be a string or None"),
        ({"private": True}, "private=True requires push_to_hub"),
    ],
)
def test_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        bh.Export("out", **options)


def test_a_name_without_a_tokenizer_is_refused_before_training(tmp_path):
    llama().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="bare' has no tokenizer or processor: none of tokenizer.json"):
        fit(tmp_path, Own(), loader(), tokenizer=str(tmp_path / "bare"))


@pytest.fixture
def held(monkeypatch):
    with hub() as held:
        to_hub(monkeypatch, held)
        yield held


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")  # huggingface_hub, of httpx
class TestPush:
    def test_what_was_verified_arrives(self, tmp_path, held):
        callback = fit(tmp_path, Own(), loader(), push_to_hub="someone/cut", private=True)
        assert callback.saved is not None
        there = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert held.repos == {"someone/cut": {"main": there}}
        assert held.private == {"someone/cut": True}

    def test_a_hub_that_refuses_costs_nothing_but_a_warning(self, tmp_path, held):
        held.refuse = "/commit/"
        with pytest.warns(UserWarning, match="To retry, run `billhook push .*out someone/cut --private`"):
            fit(tmp_path, Own(), loader(), push_to_hub="someone/cut", private=True)
        held.refuse = "\0"
        push(tmp_path / "out", "someone/cut", private=True)
        assert {path.name for path in (tmp_path / "out").iterdir()} == held.repos["someone/cut"]["main"].keys()

    def test_what_is_not_verified_is_not_pushed(self, tmp_path, held):
        with pytest.raises(RuntimeError), pytest.warns(UserWarning, match="Export failed"):
            fit(tmp_path, Own(), loader(), more=[Break()], push_to_hub="someone/cut", rehearse=False)
        assert held.asked == []

    def test_a_trial_pushes_nothing(self, tmp_path, held):
        callback = bh.Export(str(tmp_path / "out"), push_to_hub="someone/cut")
        trainer(tmp_path, [callback], fast_dev_run=True).fit(Own(), loader())
        assert held.asked == []

    def test_without_a_token_before_the_first_step(self, tmp_path, held, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
        lit = Own()
        before = {name: one.clone() for name, one in lit.state_dict().items()}
        with pytest.raises(ValueError, match=r"push_to_hub='someone/cut': no Hub token on this machine\. Run `hf auth login`"):
            fit(tmp_path, lit, loader(), push_to_hub="someone/cut")
        assert all(torch.equal(one, before[name]) for name, one in lit.state_dict().items())
        assert not (tmp_path / "out").exists()


def test_what_an_earlier_run_has_left_is_replaced_only_after_a_word_before_training(tmp_path, caplog):
    picture, said = tmp_path / "report.png", []

    class Heard(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            said.append([one.message for one in caplog.records if "(replaces" in one.message or "replaced" in one.message])

    for run in range(2):
        picture.write_bytes(b"") if run else None
        with caplog.at_level(logging.INFO):
            report = bh.Report(str(picture), measure_batches=0)
            fit(tmp_path, Own(), loader(), max_steps=1, more=[Heard(), report], tokenizer="tiny")
    assert said[0] == []
    where, date = re.escape(str(tmp_path / "out")), r"\d{4}-\d\d-\d\d \d\d:\d\d"
    saved, drawn = sorted(said[1])
    assert re.fullmatch(rf"billhook: the fit will be saved to '{where}' \(replaces the billhook checkpoint of {date}\)", saved)
    assert drawn == f"billhook: the plot {picture} will be replaced"
