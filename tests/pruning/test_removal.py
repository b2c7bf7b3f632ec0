"""Channels, hidden dimensions and experts are removed; what is left computes what it did without them, in every family."""

import copy
import random
import warnings
from contextlib import ExitStack, contextmanager, nullcontext

import numpy as np
import oracle
import peft
import pytest
import torch
import transformers
from torch import nn

import billhook as bh
from billhook.importance.baselines import RandomUnits
from billhook.model.layers import read_dim
from billhook.model.shape import shape_of
from billhook.units.find import find_units, units_of
from kit.families import build, llama, recompute, t5, tokens
from kit.removal import ALIKE, make, questions, some_heads
from kit.shaped import bert, gpt2
from kit.units import EVERY, EXPERTS, HELD, WITHOUT_CHANNELS, down_projections

NO_HEADS = ("mamba", "recurrent_gemma", "convnext", "resnet", "bloom", "mpt", "olmo2", "mamba2", "codegen")  # none, or they stay
UNUSED = "which the run never used, may have it too"
STAYS = {  # what cannot lose hidden dimensions, and why
    "olmo": "its forward pass does not work",  # a norm without weights keeps its size in a tuple
    "bart": UNUSED, "pegasus": UNUSED, "marian": UNUSED, "whisper": UNUSED,  # decoders, with an attention to no encoder
    "dinov2": UNUSED,  # a mask token
}  # fmt: skip
EXPERTS_STAY = {"dbrx": "its numbers are used as values by eq"}


def a_third(count, number):
    """Others in each layer: in a row at the beginning or at the end, or scattered."""
    lost = count // 3 + number % 2
    rows = [list(range(lost)), random.Random(number).sample(range(count), lost), list(range(count - lost, count))]
    return rows[number % 3]


@contextmanager
def without_channels(model, name, chosen):
    """Zeros what is read of channels, by the names that the family gives to what reads them."""
    parameter, dim = HELD.get(name, ("-", 0))
    with ExitStack() as undo:
        for own, gone in chosen.items():
            if own in dict(model.named_modules()):
                hook = model.get_submodule(own).register_forward_pre_hook(
                    lambda own, args, gone=gone: (args[0].index_fill(read_dim(own), torch.tensor(gone), 0), *args[1:])
                )
                undo.callback(hook.remove)
            else:
                weight = model.get_parameter(own)
                width = 80 if name == "dbrx" else weight.shape[dim]  # dbrx: all experts in one dimension
                at = torch.tensor([n for n in range(weight.shape[dim]) if n % width in set(gone)])
                undo.callback(weight.data.copy_, weight.data.clone())
                weight.data.index_fill_(dim, at, 0)
        yield


@torch.no_grad()
def answer(model, inputs):
    return oracle.answer(model(**inputs))


def readers_by_name(model, name):
    """What reads channels, by the names that the family gives it, in the order of the places."""
    held = HELD.get(name, ("-", 0))[0]
    modules = down_projections(model)
    parameters = [own for own, _ in model.named_parameters() if own.endswith(held)]
    return modules, parameters


class TestSlicedEqualsMasked:
    @pytest.mark.daily("llama", "gemma2", "phi3", "gpt2", "gpt_neox", "mixtral", "bert", "t5")
    @pytest.mark.parametrize("name", [name for name in EVERY if name not in WITHOUT_CHANNELS])
    def test_channels_and_heads_in_one_plan(self, name):
        model = make(name)
        channels = find_units(model, ["channel"])
        modules, parameters = readers_by_name(model, name)
        gone = {place: a_third(one.count(), number) for number, (place, one) in enumerate(channels.items())}
        for place in (place for place, one in channels.items() if one.of_experts):
            gone[place] = gone[place][: len(gone[place]) // 4 * 4]  # widths that the kernel of experts takes
        linear = dict(zip((place for place, one in channels.items() if one.own_readers), modules, strict=True))
        fused = dict(zip((place for place, one in channels.items() if not one.own_readers), parameters, strict=True))
        by_name = {(linear | fused)[place]: own for place, own in gone.items()}
        heads = {}
        if name not in NO_HEADS:
            found = {one: own for one, own in find_units(model, "head").items() if not one.endswith("mamba")}
            heads = some_heads(found, alike=name in ALIKE)
        inputs = questions(model)[1]
        whole = answer(model, inputs)
        with without_channels(model, name, by_name), bh.mask(model, heads) if heads else nullcontext():
            expected = answer(model, inputs)
        plan = bh.pruning.plan_units(model, gone | heads, ["channel", *(["head"] if heads else [])])
        bh.apply(model, plan)
        found = answer(model, inputs)
        assert oracle.difference(found, expected) < 1e-6
        assert oracle.difference(found, whole) > 1e-3
        assert plan.parameters[1] == sum(p.numel() for p in model.parameters())
        for place, own in linear.items():
            weight = model.get_submodule(own).weight
            assert channels[place].count() - len(gone[place]) in weight.shape

    def test_weights_by_hand(self):
        model = llama()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        bh.apply(
            model, bh.pruning.plan_units(model, {"model.layers.0.mlp": [0, 5, 47], "model.layers.1.mlp": range(1, 40)}, "channel")
        )
        stays = {"0": [n for n in range(48) if n not in (0, 5, 47)], "1": [0, *range(40, 48)]}
        for name, parameter in model.named_parameters():
            expected = before[name]
            if "mlp" in name:
                kept = stays[name.split(".")[2]]
                expected = expected[:, kept] if "down" in name else expected[kept]
            assert torch.equal(parameter, expected), name
            assert parameter.is_leaf
            assert parameter.is_contiguous()
        mlp = model.model.layers[1].mlp
        assert (mlp.up_proj.out_features, mlp.down_proj.in_features, mlp.gate_proj.out_features) == (9, 9, 9)


def assert_permutation_exact(model, kinds, gone, inputs):
    """With the units that go put last, everywhere, it computes the same; without them it is what is left before these."""
    structure = bh.trace(model)
    units = units_of(model, structure, kinds)
    whole, twin = answer(model, inputs), copy.deepcopy(model)
    tensors = dict([*twin.named_parameters(), *twin.named_buffers()])
    groups = {place: next(group for group in structure.groups if group.leaf in units[place].leaves) for place in gone}
    for place, group in groups.items():
        order = np.array([unit for unit in range(group.size) if unit not in gone[place]] + list(gone[place]))
        for member in group.members:
            tensors[member.name].data = oracle.permuted(tensors[member.name].data, member.dim, group.index(member), order)
    assert oracle.difference(answer(twin, inputs), whole) < 1e-4
    kept: dict[tuple[str, int], np.ndarray] = {}
    for place, group in groups.items():
        for member in group.members:
            stays = group.index(member) < group.size - len(gone[place])
            kept[member.name, member.dim] = stays & kept.get((member.name, member.dim), True)
    for (name, dim), stays in kept.items():
        tensors[name].data = tensors[name].data.index_select(dim, torch.from_numpy(np.flatnonzero(stays)))
    plan = bh.pruning.plan_units(model, gone, kinds)
    bh.apply(model, plan)
    folded = (
        ("embed_tokens.weight", "embed_scale", "model.norm.weight") if "Gemma" in type(model).__name__ else ()
    )  # see test_removal_constants
    assert all(
        torch.equal(p, tensors[name])
        for name, p in [*model.named_parameters(), *model.named_buffers()]
        if name in tensors and not name.endswith(folded)
    )
    assert plan.parameters[1] == sum(p.numel() for p in model.parameters())
    found = answer(model, inputs)
    assert torch.equal(found.isfinite(), whole.isfinite())
    assert found.shape == whole.shape
    assert oracle.difference(found, whole) > 1e-3


class TestResidual:
    def test_with_heads_whose_numbers_mean_several_things(self):
        """As one head is left, and a head's width is the number of KV heads, the code also runs with a width of 1."""
        model = llama(hidden_size=32, num_attention_heads=8, num_key_value_heads=4, head_dim=4)
        one, ids, (place,) = copy.deepcopy(model), tokens(), find_units(model, ["residual"])
        heads = {"model.layers.0.self_attn": [0, 1, 2, 3, 5, 6, 7]}
        bh.pruning.prune_units(one, {place: [0, 1, 2, 3], **heads}, kind=["residual", "head"])
        bh.pruning.prune_units(model, {place: [0, 1, 2, 3]}, kind="residual")
        bh.pruning.prune_units(model, heads)
        with torch.no_grad():
            torch.testing.assert_close(one(ids).logits, model(ids).logits)
        assert one.model.layers[0].self_attn.head_dim == 4

    @pytest.mark.daily("llama", "gemma2", "phi3", "gpt2", "gpt_neox", "mixtral", "bert", "t5", "mamba", "deepseek_v3")
    @pytest.mark.parametrize("name", EVERY)
    def test_permutation_exact_in_every_family(self, name):
        model = make(name)
        units = find_units(model, ["residual"])
        gone = {place: random.Random(0).sample(range(one.count()), max(one.count() // 4, 1)) for place, one in units.items()}
        if name in STAYS:
            before = {own: id(tensor) for own, tensor in model.state_dict(keep_vars=True).items()}, shape_of(model)
            colon = "" if name == "olmo" else ":"
            with pytest.raises(ValueError, match=f"hidden dimensions{colon} cannot be removed from .*{STAYS[name]}"):
                bh.apply(model, bh.pruning.plan_units(model, gone, ["residual"]))
            assert ({own: id(tensor) for own, tensor in model.state_dict(keep_vars=True).items()}, shape_of(model)) == before
            return
        assert_permutation_exact(model, ["residual"], gone, questions(model)[1])

    def test_depthwise_convolutions_follow(self, tmp_path):
        """Against the class itself, built narrower in every stage, of which it says that channels are four times as many."""
        sizes = {"depths": [1, 1], "num_stages": 2, "image_size": 16, "patch_size": 2, "layer_scale_init_value": 0.5}
        wide, narrow = (
            transformers.ConvNextForImageClassification(transformers.ConvNextConfig(hidden_sizes=widths, **sizes)).eval()
            for widths in ([8, 16], [6, 12])
        )
        bh.apply(wide, bh.plan(wide, bh.importance.WeightNorm(), amount=bh.Amount(residual=0.25)))
        bh.save(wide, tmp_path / "wide")
        loaded, pixels = bh.load(tmp_path / "wide"), {"pixel_values": torch.randn(2, 3, 16, 16)}
        assert loaded.convnext.encoder.stages[1].layers[0].dwconv.groups == 12
        torch.testing.assert_close(answer(loaded, pixels), answer(wide, pixels), rtol=0, atol=0)
        bh.apply(wide, bh.plan(wide, bh.importance.WeightNorm(), amount=bh.Amount(channels=0.25)))
        narrow.load_state_dict(wide.state_dict())
        torch.testing.assert_close(answer(narrow, pixels), answer(wide, pixels))

    @pytest.mark.parametrize(("name", "tied"), [("llama", True), ("llama", False), ("t5", True), ("qwen3", False)])
    def test_as_its_class_builds_it(self, name, tied):
        """Against the class itself, built narrower, with slices by hand; no other dimension has that size."""
        torch.manual_seed(1)
        width = 27 if name == "t5" else 24  # Llama's config wants a multiple of its heads
        stays = torch.tensor(sorted(random.Random(1).sample(range(40), width)))
        if name == "t5":
            fields = {"d_kv": 8, "d_ff": 48, "num_heads": 3, "num_layers": 2, "vocab_size": 64, "tie_word_embeddings": tied}
            config = transformers.T5Config(d_model=40, decoder_start_token_id=0, **fields)
            model = transformers.T5ForConditionalGeneration(config).eval()
            narrow = transformers.T5ForConditionalGeneration(
                transformers.T5Config(d_model=width, decoder_start_token_id=0, **fields)
            ).eval()
        else:
            model = build(name, hidden_size=40, head_dim=8, num_key_value_heads=2, tie_word_embeddings=tied)
            narrow = build(name, hidden_size=width, head_dim=8, num_key_value_heads=2, tie_word_embeddings=tied)
        slices = {}
        for own, tensor in model.state_dict().items():
            for dim, size in enumerate(tensor.shape):
                tensor = tensor.index_select(dim, stays) if size == 40 else tensor
            slices[own] = tensor
        narrow.load_state_dict(slices)
        ids = tokens()
        more = {"decoder_input_ids": tokens(2, 5)} if name == "t5" else {}
        (place,) = find_units(model, ["residual"])
        bh.apply(model, bh.pruning.plan_units(model, {place: sorted(set(range(40)) - set(stays.tolist()))}, "residual"))
        assert torch.equal(model(ids, **more).logits, narrow(ids, **more).logits)
        assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in narrow.named_parameters()}
        embedded = model.get_input_embeddings()
        assert (embedded.weight is model.get_output_embeddings().weight) == (tied or name == "t5")
        assert embedded.embedding_dim == model.config.hidden_size == width

    def test_opt_whose_embeddings_are_narrower(self):
        config = transformers.OPTConfig(
            vocab_size=64, hidden_size=32, word_embed_proj_dim=20, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, do_layer_norm_before=False,
        )  # fmt: skip
        model = transformers.OPTForCausalLM(config).double().eval()
        oracle.randomise(model)
        units = find_units(model, ["residual"])
        assert {one.count() for one in units.values()} >= {32}
        gone = {place: list(range(0, one.count(), 5)) for place, one in units.items()}
        assert_permutation_exact(model, ["residual"], gone, questions(model)[1])


@contextmanager
def barred(monkeypatch, model, gone):
    """No token takes some experts: their logits, which the routers make of their weights, are -inf."""
    real = nn.functional.linear
    routers = {id(p): gone[name.rpartition(".")[0].rpartition(".")[0]] for name, p in model.named_parameters()
               if name.endswith(("mlp.gate.weight", "mlp.router.weight"))}  # fmt: skip

    def linear(x, weight, bias=None):
        out = real(x, weight, bias)
        return out.index_fill(-1, torch.tensor(routers[id(weight)]), -torch.inf) if id(weight) in routers else out

    assert len(routers) == len(gone)
    with monkeypatch.context() as patched:
        patched.setattr(nn.functional, "linear", linear)
        yield


class TestExperts:
    @pytest.mark.parametrize("name", EXPERTS)
    def test_permutation_exact_in_every_family(self, name):
        model = make(name)
        gone = {place: [number, 3] for number, place in enumerate(find_units(model, ["expert"]))}
        if name in EXPERTS_STAY:
            with pytest.raises(ValueError, match=f"experts: cannot be removed from .*: {EXPERTS_STAY[name]}"):
                bh.pruning.plan_units(model, gone, "expert")
            return
        assert_permutation_exact(model, ["expert"], gone, questions(model)[1])

    @pytest.mark.parametrize("uneven", [False, True])
    @pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
    def test_as_if_no_token_took_them(self, name, uneven, monkeypatch):
        model = make(name)
        first, second = find_units(model, ["expert"])
        gone = {first: [0, 2], second: [1] if uneven else [1, 2]}
        ids = torch.randint(11, 100, (2, 9))
        with torch.no_grad(), barred(monkeypatch, model, gone):
            expected = model(ids).logits
        whole = model(ids).logits.detach()
        bh.apply(model, bh.pruning.plan_units(model, gone, "expert"))
        torch.testing.assert_close(model(ids).logits, expected)
        assert oracle.difference(whole, expected) > 1e-3
        said = [value for key, value in vars(model.config).items() if key in ("num_local_experts", "num_experts")]
        assert said == [4 if uneven else 2]
        assert model.config.num_experts_per_tok == 2

    def test_fewer_than_a_token_takes(self):
        model = make("mixtral")
        place = next(iter(find_units(model, ["expert"])))
        before = shape_of(model)
        match = f"experts: {place} would be left with 1 of 4 experts, but each token uses 2. Keep at least 2"
        with pytest.raises(ValueError, match=match):
            bh.pruning.plan_units(model, {place: [0, 1, 2]}, "expert")
        with pytest.raises(ValueError, match="each token uses 2"):
            bh.plan(model, RandomUnits(), experts=0.75)
        assert shape_of(model) == before
        one = build("mixtral", num_experts_per_tok=1)
        bh.apply(one, bh.pruning.plan_units(one, {place: [0, 1, 2]}, ["expert"]))
        assert one(tokens()).logits.isfinite().all()

    def test_the_loss_of_the_router_follows(self):
        model = build("mixtral")
        bh.apply(model, bh.plan(model, RandomUnits(), experts=0.5))
        said = model.train()(tokens(), labels=tokens(), output_router_logits=True)
        assert said.router_logits[0].shape[-1] == model.num_experts == 2
        said.loss.backward()

    def test_widths_that_a_kernel_does_not_take(self):
        """Torch's kernel for experts takes rows of whole 16 bytes: plans keep such widths, and name the legal ones."""
        model = build("mixtral")
        before = shape_of(model), [id(p) for p in model.parameters()]
        with pytest.raises(ValueError, match="would be left with 47 of 48, .* multiples of 4. Keep 44 or 48"):
            bh.pruning.plan_units(model, {0: [5]}, "channel")
        assert (shape_of(model), [id(p) for p in model.parameters()]) == before
        bh.apply(model, plan := bh.plan(model, RandomUnits(), channels=0.3))
        assert set(plan.after.values()) == {(36,)}
        model.train()(tokens(), labels=tokens()).loss.backward()

    def test_widths_of_half_precision(self):
        model = build("mixtral").bfloat16()
        plan = bh.plan(model, RandomUnits(), channels=0.2)
        assert set(plan.after.values()) == {(40,)}


def every_kind(model):
    """A plan of heads, channels and hidden dimensions of a small Llama."""
    return bh.plan(model, RandomUnits(), heads=0.5, channels=0.25, residual=0.25)


def cut(plan, name, tensor):
    for dim in range(tensor.dim()):
        if (name, dim) in plan.cuts:
            tensor = tensor.index_select(dim, torch.from_numpy(plan.cuts[name, dim]))
    return tensor


class TestTraining:
    MAKE = {
        "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1),
        "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    }

    @pytest.mark.parametrize("kind", MAKE)
    def test_optimizer_gradients_and_all_else(self, kind):
        model = llama(tie_word_embeddings=True).double().train()
        recompute(model)
        frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = self.MAKE[kind]([{"params": trained[::2]}, {"params": trained[1::2], "lr": 2e-2}])
        ids = tokens()
        for _ in range(2):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
        order = [
            [next(n for n, p in model.named_parameters() if p is one) for one in group["params"]]
            for group in optimizer.param_groups
        ]
        twin = copy.deepcopy(model)
        for name, p in twin.named_parameters():
            p.grad = None if model.get_parameter(name).grad is None else model.get_parameter(name).grad.clone()
        states = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}
        generation, random_state = copy.deepcopy(model.generation_config), torch.get_rng_state()
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        modes = [(module.training, *module._forward_hooks, *module._forward_pre_hooks) for module in model.modules()]
        plan = every_kind(model)
        bh.apply(model, plan, optimizer)

        assert torch.equal(torch.get_rng_state(), random_state)
        assert model.generation_config.to_dict() == generation.to_dict()
        assert [(module.training, *module._forward_hooks, *module._forward_pre_hooks) for module in model.modules()] == modes
        assert model.is_gradient_checkpointing
        assert {name: buffer.tolist() for name, buffer in model.named_buffers()} == {n: b.tolist() for n, b in buffers.items()}
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert frozen.shape != model.model.layers[0].mlp.up_proj.weight.shape
        assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"model.layers.0.mlp.up_proj.weight"}
        for group, names in zip(optimizer.param_groups, order, strict=True):
            assert [id(p) for p in group["params"]] == [id(model.get_parameter(name)) for name in names]
        assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 2e-2]
        for name, parameter in model.named_parameters():
            own = twin.get_parameter(name)
            assert torch.equal(parameter, cut(plan, name, own)), name
            assert (parameter.grad is None) == (own.grad is None)
            assert own.grad is None or torch.equal(parameter.grad, cut(plan, name, own.grad)), name
            assert (parameter in optimizer.state) == (name in states)
            for key, value in states.get(name, {}).items():
                assert torch.equal(optimizer.state[parameter][key], cut(plan, name, value) if value.dim() else value), (name, key)
        assert len(optimizer.state) == len(states)
        optimizer.step()
        model(ids, labels=ids).loss.backward()
        optimizer.step()

    def test_a_moving_average_of_the_weights(self):
        model = llama()
        average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        average.update_parameters(model)
        twin = copy.deepcopy(average.module)
        plan = every_kind(model)
        bh.apply(model, plan)
        bh.apply(average, plan)
        for name, parameter in average.module.named_parameters():
            assert torch.equal(parameter, cut(plan, name, twin.get_parameter(name)))
        average.update_parameters(model)
        assert shape_of(average.module) == shape_of(model)

    @pytest.mark.daily("llama")
    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_lora(self, name):
        model = llama() if name == "llama" else gpt2()
        targets = ["q_proj", "up_proj", "down_proj"] if name == "llama" else ["c_attn", "c_fc", "c_proj"]
        config = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False, fan_in_fan_out=name == "gpt2")
        adapted = peft.get_peft_model(model, config).double().eval()
        merged = copy.deepcopy(adapted).merge_and_unload()
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-2)
        ids = tokens()
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        merged = copy.deepcopy(adapted).merge_and_unload()
        names = [own for own, one in find_units(adapted, ["channel", "residual"]).items()]
        plain = list(find_units(merged, ["channel", "residual"]))
        gone = [a_third(48 if name == "llama" else 128, n) for n in (0, 1)] + [[0, 5, 6, 31]]
        ranks = {p.shape for n, p in adapted.named_parameters() if "lora_" in n}
        bh.apply(adapted, bh.pruning.plan_units(adapted, dict(zip(names, gone, strict=True)), ["channel", "residual"]), optimizer)
        bh.apply(merged, bh.pruning.plan_units(merged, dict(zip(plain, gone, strict=True)), ["channel", "residual"]))
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits)
        torch.testing.assert_close(copy.deepcopy(adapted).merge_and_unload()(ids).logits, merged(ids).logits)
        assert {p.shape for n, p in adapted.named_parameters() if "lora_" in n} != ranks
        assert all(2 in p.shape for n, p in adapted.named_parameters() if "lora_" in n)
        assert all(layer.in_features == layer.lora_A.default.in_features == layer.lora_A.default.weight.shape[1]
                   and layer.out_features == layer.lora_B.default.weight.shape[0]
                   for layer in adapted.modules() if hasattr(layer, "lora_A"))  # fmt: skip
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in adapted.parameters() if p.requires_grad}


class TestRoundTrip:
    @pytest.mark.daily("llama-*", "gpt2-amount6-shaped", "t5-*")
    @pytest.mark.parametrize(("name", "amount", "way"), [
        ("llama", {"channels": 0.25}, "plain"),
        ("llama", {"kv_heads": 0.5, "channels": 0.3, "residual": 0.25}, "plain"),
        ("llama", {"channels": 0.25, "ranking": "global"}, "shaped"),
        ("mixtral", {"experts": 0.5, "residual": 0.25}, "plain"),
        ("qwen3_moe", {"experts": 0.5, "channels": 0.25}, "plain"),
        ("gpt2", {"channels": 0.25}, "plain"),
        ("gpt2", {"residual": 0.25}, "shaped"),
        ("bert", {"residual": 0.25}, "shaped"),
        ("t5", {"channels": 0.25, "residual": 0.25}, "plain"),
    ])  # fmt: skip
    def test_saved_and_loaded(self, name, amount, way, tmp_path):
        model = {"gpt2": gpt2, "bert": bert, "t5": t5}.get(name, lambda: build(name))()
        bh.apply(model, bh.plan(model, bh.importance.WeightNorm(), amount=bh.Amount(**amount)))
        more = {"decoder_input_ids": torch.arange(10).view(2, 5)} if name == "t5" else {}
        ids = torch.arange(24).view(2, 12)
        expected = model(ids, **more).logits
        saved = bh.save(model, tmp_path / "a")
        assert (saved.way, saved.difference) == (way, 0)
        for again in [bh.load(tmp_path / "a"), *([type(model).from_pretrained(tmp_path / "a")] if way == "plain" else [])]:
            assert torch.equal(again(ids, **more).logits, expected)
            assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert bh.summary(again) == bh.summary(model)
