"""Masks that are learned: chosen anew after each step, by which all weights go on learning, and then fixed."""

import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch.func import functional_call
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import billhook as bh
from billhook.model.layers import prunable
from kit import prunes
from kit.families import llama, recompute
from kit.fits import data, same, trainer, weights
from kit.weight_pruning import (
    FEW,
    OPTIMIZERS,
    Classifier,
    Plain,
    Zeros,
    checkpoints,
    images,
    injected,
    loader,
    module,
    pruning,
    zeros,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
    # the resumed runs do without the ModelCheckpoint of the straight one
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
]

WAYS = {
    "wanda": {"sparsity": 0.5},
    "later": {"sparsity": 0.75, "at": 2, "criterion": bh.Magnitude(compares="row")},
    "pairs": {"pattern": "2:4", "criterion": bh.criteria.RIA(), "sequential": "layer"},
    "owl": {"sparsity": 0.5, "allocation": bh.criteria.OWL()},
}


def learning(end=5, decay=2e-4, **options):
    callback = prunes.SRSTE(**{"sparsity": 0.5, "end": end} | FEW | options)
    callback.decay = decay
    return callback


@pytest.mark.daily("later", "pairs")
@pytest.mark.parametrize("way", WAYS)
def test_all_weights_learn_until_the_end_and_then_zeros_are_held(files, tmp_path, way):
    given = {"sparsity": None} | WAYS[way]
    lit, callback = module(), learning(**given)
    trainer(tmp_path, [callback, checkpoints(tmp_path)]).fit(lit, data(files))
    linears, states = prunable(lit.model), {step: torch.load(tmp_path / f"step={step}.ckpt") for step in range(1, 9)}
    of_callback = [next(one for key, one in state["callbacks"].items() if "SRSTE" in key) for state in states.values()]
    assert ["learned" in one for one in of_callback] == [step >= callback.events[0]["step"] and step < 5 for step in states]
    assert [event["step"] for event in callback.events] == [given.get("at", 0), 5]
    assert callback.events[1]["after"]["sparsity"] == pytest.approx(given["sparsity"] or 0.5, abs=0.01)
    for name, mask in callback.masks.items():
        assert (linears[name].weight[~mask] == 0).all()
        assert linears[name].weight[mask].all()
        for step, state in states.items():
            assert bool(state["state_dict"][f"model.{name}.weight"][~mask].any()) == (step < 5), (name, step)
    if way == "pairs":
        assert all((mask.view(len(mask), -1, 4).sum(-1) == 2).all() for mask in callback.masks.values())
    elif way != "owl":
        assert zeros(lit) == (given["sparsity"],) * 2
    assert all(torch.isfinite(value).all() for value in lit.state_dict().values())


class Descent(Plain):
    """Plain gradient descent, so that a step is easily written down."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


@pytest.mark.daily("*-0.1")
@pytest.mark.parametrize("decay", [0, 0.1])
@pytest.mark.parametrize("criterion", [bh.Magnitude(compares="row"), bh.Wanda()], ids=["magnitude", "wanda"])
def test_equals_the_paper_written_down(tmp_path, criterion, decay):
    """W <- W - lr (g(m * W) + decay (1 - m) * W), m of the highest |W| times the norms of the dense model's inputs."""
    batches = [{"input_ids": ids, "attention_mask": mask} for ids, mask in list(loader())[:3]]
    lit, callback = Descent(), learning(4, decay, criterion=criterion, calibration=batches, sequential="none")
    trainer(tmp_path, [callback], 6).fit(lit, loader())

    model = Descent().net
    linears, norms = prunable(model), {}

    def add(name):
        return lambda _, given: norms.__setitem__(name, norms.get(name, 0) + given[0].detach().flatten(0, 1).square().sum(0))

    hooks = [linear.register_forward_pre_hook(add(name)) for name, linear in linears.items()]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    for step, (ids, mask) in enumerate(list(loader())[:6]):
        if step <= 4:
            keeps = {}
            for name in linears:
                scores = parameters[f"{name}.weight"].abs() * (norms[name].sqrt() if criterion == bh.Wanda() else 1)
                keeps[f"{name}.weight"] = scores >= scores.sort(1).values[:, scores.shape[1] // 2, None]
        if step >= 4:
            parameters = {name: value * keeps.get(name, 1) for name, value in parameters.items()}
        seen = {name: (value * keeps.get(name, 1)).requires_grad_() for name, value in parameters.items()}
        loss = functional_call(model, seen, kwargs={"input_ids": ids, "attention_mask": mask, "labels": ids}).loss
        for (name, value), gradient in zip(parameters.items(), torch.autograd.grad(loss, list(seen.values())), strict=True):
            value -= 0.5 * (gradient + (decay * ~keeps[name] * value if name in keeps else 0))
    parameters = {name: value * keeps.get(name, 1) for name, value in parameters.items()}
    for name, value in lit.net.named_parameters():
        torch.testing.assert_close(value.detach(), parameters[name], atol=1e-6, rtol=1e-5, msg=lambda m, own=name: f"{own}: {m}")


def test_a_fit_that_was_interrupted_goes_on(files, tmp_path):
    class Interrupts(Zeros):
        def on_train_batch_end(self, run, *_):
            if run.global_step == 3:
                raise KeyError("three")

    straight = module()
    trainer(tmp_path, [learning()]).fit(straight, data(files))
    lit, callback, watch = module(), learning(), Interrupts()
    run = trainer(tmp_path, [callback, watch, checkpoints(tmp_path)])
    with pytest.raises(KeyError):
        run.fit(lit, data(files))
    assert not any(linear._forward_hooks for linear in prunable(lit.model).values())
    trainer(tmp_path, [callback]).fit(lit, data(files), ckpt_path=tmp_path / "step=2.ckpt")
    assert same(weights(lit), weights(straight))


def test_a_saved_model_is_the_one_that_was_learned(files, tmp_path):
    lit, callback = module(), learning()
    trainer(tmp_path, [callback, bh.Export(str(tmp_path / "out"))]).fit(lit, data(files))
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.randint(3, 60, (2, 9))
    assert all((linear.weight == 0).float().mean() == 0.5 for linear in prunable(loaded).values())
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, lit.model.eval()(ids).logits, atol=0, rtol=0)


def test_what_is_saved_meanwhile_is_what_runs_see(files, tmp_path):
    class Saves(Zeros):
        def on_train_batch_end(self, run, pl_module, *_):
            if run.global_step == 2:
                before = weights(pl_module)
                bh.save(pl_module.model, tmp_path / "out")
                assert same(before, weights(pl_module))

    lit, plain = module(), module()
    trainer(tmp_path, [learning(), Saves()]).fit(lit, data(files))
    trainer(tmp_path, [learning()]).fit(plain, data(files))
    assert same(weights(lit), weights(plain))
    saved = prunable(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert all((linear.weight == 0).float().mean() == 0.5 for linear in saved.values())


def test_validation_sees_what_masks_keep(files, tmp_path):
    """From the first moment on, and by the masks of each step."""
    lit, callback = module(), learning(measure_batches=2)
    run = trainer(tmp_path, [callback, checkpoints(tmp_path)], val_check_interval=1, limit_val_batches=2)
    run.fit(lit, data(files))
    begun, fixed = callback.events
    assert begun["after"]["val_loss"] > begun["before"]["val_loss"]
    assert "sparsity" not in begun["after"]
    assert fixed["after"]["sparsity"] == 0.5
    assert fixed["after"]["val_loss"] == fixed["before"]["val_loss"]
    assert "masks of sparsity 0.5000 in 14 linear layers are learned until step 5" in begun["what"]
    once = pruning(sparsity=0.5, measure_batches=2)
    trainer(tmp_path, [once], 1, limit_val_batches=2).fit(module(), data(files))
    assert once.events[0]["after"]["val_loss"] == pytest.approx(begun["after"]["val_loss"], rel=1e-6)


def test_weights_that_are_left_out_come_back(files, tmp_path):
    """Masks at the end are not those of the beginning, as they are where zeros are held."""
    lit, callback, once = module(), learning(8), pruning(sparsity=0.5)
    trainer(tmp_path, [once]).fit(module(), data(files))
    trainer(tmp_path, [callback]).fit(lit, data(files))
    moved = [(mask != once.masks[name]).float().mean().item() for name, mask in callback.masks.items()]
    assert min(moved) > 0.01


def test_training_that_ends_before_zeroes_what_is_left_out(files, tmp_path):
    lit, callback = module(), learning(8)
    with pytest.warns(UserWarning, match="before the event at step 8"):
        trainer(tmp_path, [callback, StopAt(3)]).fit(lit, data(files))
    assert zeros(lit) == (0.5, 0.5)
    assert callback.events[-1]["step"] == 3
    assert "learned" in callback.events[-1]["what"]


class StopAt(Zeros):
    """Ends training after a step."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.step


@pytest.mark.daily("sgd", "fused", "muon")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(tmp_path, optimizer):
    lit, callback = Plain(), learning(4)
    lit.optimizer = optimizer
    trainer(tmp_path, [callback]).fit(lit, loader())
    shares = {round((linear.weight == 0).float().mean().item(), 4) for linear in prunable(lit.net).values()}
    assert shares == {0.5}
    assert not any(linear._forward_hooks or linear._forward_pre_hooks for linear in prunable(lit.net).values())


@pytest.mark.daily("*accumulate*", "*bf16-true*")
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1, "val_check_interval": 2},
        {"fast_dev_run": 2},
    ],
    ids=str,
)
def test_trainers(files, tmp_path, options):
    lit, callback = module(), learning(2)
    trainer(tmp_path, [callback], 4, **options).fit(lit, data(files))
    assert zeros(lit) == (0.5, 0.5)


def test_accumulated_gradients_are_those_of_the_whole_batch(files, tmp_path):
    """What draws weights to zero is added once a step."""
    found = []
    for size, each in ((4, 1), (2, 2)):
        lit = module()
        trainer(tmp_path, [learning(4, 0.5)], 4, accumulate_grad_batches=each).fit(lit, data(files, batch_size=size))
        found.append(weights(lit))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-4, rtol=1e-3)


class Recomputed(Plain):
    """Runs blocks again for their gradients."""

    def __init__(self):
        super().__init__()
        recompute(self.net, {"use_reentrant": False})


def test_blocks_that_are_run_again_for_gradients(tmp_path):
    found = []
    for kind in (Plain, Recomputed):
        lit = kind()
        trainer(tmp_path, [learning(4)]).fit(lit, loader())
        found.append(weights(lit))
    assert same(*found)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, of what it compiles
def test_a_compiled_model(tmp_path):
    found = []
    for compiled in (False, True):
        lit = Plain()
        if compiled:
            lit.net.compile(backend="aot_eager")
        trainer(tmp_path, [learning(4)], 6).fit(lit, loader())
        found.append(weights(lit))
    torch.compiler.reset()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-6, rtol=1e-5)


def check(callback, net):
    linears = prunable(net)
    assert callback.masks.keys() == linears.keys()
    for name, mask in callback.masks.items():
        weight = linears[name].weight
        assert mask.shape == weight.shape
        assert mask.float().mean() == pytest.approx(0.5, abs=0.03)
        assert (weight[~mask] == 0).all()
        assert weight[mask].all()


def test_linears_whose_weights_lie_the_other_way(tmp_path):
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=1)
    lit, callback = Plain(GPT2LMHeadModel(config)), learning(4)
    trainer(tmp_path, [callback]).fit(lit, loader())
    check(callback, lit.net)


def test_linears_that_share_a_weight_use_one_mask(tmp_path):
    net, seen = llama(), []
    first, second = (layer.mlp.up_proj for layer in net.model.layers)
    second.weight = first.weight
    lit, callback = Plain(net), learning(4)
    look = second.register_forward_hook(lambda one, *_: seen.append(float((one.weight == 0).float().mean())))
    trainer(tmp_path, [callback], 6).fit(lit, loader())
    look.remove()
    assert seen.pop(0) == 0  # of the run that statistics are taken in
    assert set(seen[-6:]) == {0.5}
    assert "model.layers.1.mlp.up_proj" not in callback.masks


def test_convolutions(tmp_path):
    lit, callback = Classifier(), learning(3, calibration=4)
    trainer(tmp_path, [callback, checkpoints(tmp_path)], 5, limit_train_batches=2).fit(lit, images())
    check(callback, lit.net)
    resumed = Classifier()
    last = {"ckpt_path": tmp_path / "step=2.ckpt", "weights_only": False}
    trainer(tmp_path, [learning(3, calibration=4)], 5, limit_train_batches=2).fit(resumed, images(), **last)
    assert same(weights(lit), weights(resumed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": bh.SparseGPT()}, "updates kept weights"),
        ({"criterion": bh.Magnitude("global")}, "compares weights of all layers"),
        ({"sparsity": bh.schedules.Linear(final=0.5)}, "sparsity="),
        ({"at": bh.schedules.Linear(final=1.0)}, "at="),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        prunes.SRSTE(**{"sparsity": 0.5} | options)


@pytest.mark.parametrize("options", [{"end": -1}, {"end": 1.5}, {"end": True}], ids=str)
def test_settings_that_are_none_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        prunes.SRSTE(sparsity=0.5, **options)


def test_fits_in_which_masks_cannot_be_learned_are_refused(files, tmp_path):
    def refused(message, lit=None, more=(), learn=None, **options):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, [learn or learning(), *more], **options).fit(lit or module(), data(files))

    refused(r"end=2 is step 2.*learned from step 2 on", learn=learning(2, at=2))
    refused("all base weights are frozen", injected())
    refused("cannot mask the copy of WeightAveraging", more=[WeightAveraging()])
    refused("learned masks use the layers' inputs", more=[bh.HeadPruning(0.5, at=3, **FEW)])
