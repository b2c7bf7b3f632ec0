"""Blocks: found, ranked, planned and removed."""

import copy
import json

import peft
import pytest
import torch
import transformers
from torch import nn

import billhook as bh
from billhook.model.checkpoint_shape import load_shape, save_shape
from billhook.model.find import find_transformer
from billhook.model.inputs import make_inputs
from billhook.model.shape import set_shape, shape_of
from billhook.units.blocks import block_of, find_blocks, skipping
from kit.families import build, llama, tokens
from kit.shaped import bert, gpt2, uneven_llama
from kit.unharmed import everything
from kit.units import MIXED, influence, other, t5

LAYERS = "model.layers"


def deep(**changes):
    """A Llama of five blocks."""
    return llama(num_hidden_layers=5, **changes)


def without(model, stack, gone):
    """A model built anew from a config that says fewer layers, with the weights copied over by name: an independent reference."""
    config = copy.deepcopy(model.config)
    stays = [n for n in range(len(model.get_submodule(stack))) if n not in gone]
    config.num_hidden_layers = len(stays)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[n] for n in stays]
    new, state = type(model)(config).eval(), model.state_dict()
    names = {f"{stack}.{place}.": f"{stack}.{n}." for place, n in enumerate(stays)}
    for name, value in new.state_dict().items():
        prefix = next((own for own in names if name.startswith(own)), "")
        value.copy_(state[names[prefix] + name.removeprefix(prefix)] if prefix else state[name])
    return new


FOUND = {
    "llama": (lambda: llama(), {LAYERS: 2}),
    "mixtral": (lambda: build("mixtral"), {LAYERS: 2}),
    "gpt2": (gpt2, {"transformer.h": 2}),
    "bert": (bert, {"bert.encoder.layer": 2}),
    "opt": (lambda: other("OPTForCausalLM"), {"model.decoder.layers": 2}),
    "vit": (lambda: other("ViTForImageClassification"), {"vit.layers": 2}),
    "t5": (t5, {"encoder.block": 3, "decoder.block": 4}),
    "albert": (lambda: other("AlbertForMaskedLM"), {"albert.encoder.albert_layer_groups": 1}),
    "mamba": (lambda: other("MambaForCausalLM"), {"backbone.layers": 2}),
    "swin": (
        lambda: other("SwinForImageClassification"),
        {f"swin.encoder.layers.{n}.blocks": 2 for n in range(4)},
    ),  # stages are no blocks
}


class TestFinding:
    @pytest.mark.parametrize("family", FOUND)
    def test_stacks_of_any_family(self, family):
        make, expected = FOUND[family]
        model = make()
        found = find_blocks(model)
        assert {name: len(stack) for name, stack in found.items()} == expected
        assert all(model.get_submodule(name) is stack for name, stack in found.items())

    def test_of_a_module_that_holds_a_model_and_with_adapters(self):
        adapted = peft.get_peft_model(llama(), peft.LoraConfig(target_modules="all-linear"))
        assert list(find_blocks(nn.ModuleDict({"net": adapted}))) == [LAYERS]

    def test_where_something_is(self):
        stacks = find_blocks(t5())
        assert block_of("encoder.block.1.layer.0.SelfAttention.q.weight", stacks) == ("encoder.block", 1)
        assert block_of("decoder.block.3", stacks) == ("decoder.block", 3)
        assert block_of("encoder.final_layer_norm.weight", stacks) is None

    def test_a_model_without_blocks(self):
        with pytest.raises(ValueError, match="ResNet.* has no blocks"):
            find_blocks(other("ResNetForImageClassification"))

    def test_inputs_that_do_not_fit(self):
        with pytest.raises(ValueError, match="LlamaForCausalLM does not run with inputs input_ids: "):
            find_blocks(llama(), {"input_ids": torch.zeros(1, 2, 3, 4, 5)})


def padded():
    """A row of 9 tokens, and one of 6 with padding before it."""
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    ids[1, :3], mask[1, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


INFLUENCE = bh.importance.BlockInfluence()
EVERY = [INFLUENCE, bh.importance.Ablation()]


def scored(model, batches, importance=INFLUENCE, **options):
    return bh.score(model, bh.find_units(model, "block"), importance, batches, **options)


class TestImportance:
    def test_influence_is_the_papers_formula(self):
        model, batch = deep(), padded()
        found = scored(model, [batch])
        assert list(found) == [LAYERS]
        assert found[LAYERS].shape == (5,)
        torch.testing.assert_close(found[LAYERS], influence(model, batch).float(), rtol=1e-5, atol=1e-7)

    def test_every_token_counts_the_same_whatever_batch_it_is_in(self):
        model, batch = deep(), padded()
        rows = [{name: value[n : n + 1] for name, value in batch.items()} for n in range(2)]
        one, two = scored(model, [batch])[LAYERS], scored(model, rows)[LAYERS]
        torch.testing.assert_close(one, two)
        bare = {"input_ids": batch["input_ids"][1:, 3:]}
        alone = scored(model, [rows[0], bare])[LAYERS]
        torch.testing.assert_close(alone, two, rtol=1e-4, atol=1e-6)  # rotary positions are relative

    def test_loss_is_that_of_the_model_without_the_block(self):
        model, batches = deep(), [{"input_ids": tokens(2, n)} for n in (7, 9)]
        found = scored(model, batches, bh.importance.Ablation())[LAYERS]
        for n in range(5):
            small = without(model, LAYERS, [n])
            losses = [own(**batch, labels=batch["input_ids"]).loss.item() for own in (small, model) for batch in batches]
            assert float(found[n]) == pytest.approx(sum(losses[:2]) / 2 - sum(losses[2:]) / 2, rel=1e-4, abs=1e-6)

    @pytest.mark.parametrize("importance", EVERY, ids=repr)
    def test_encoder_and_decoder_and_blocks_that_are_masked(self, importance):
        model, batch = t5(), {"input_ids": tokens(), "labels": tokens(2, 5)}
        with bh.mask(model, {"decoder.block": [2]}, "block"):
            found = scored(model, [batch], importance)
        assert {name: len(own) for name, own in found.items()} == {"encoder.block": 3, "decoder.block": 4}
        assert all(own.isfinite().all() for own in found.values())
        assert float(found["decoder.block"][2]) == pytest.approx(0, abs=1e-6)  # which changes nothing any more

    @pytest.mark.parametrize("importance", EVERY, ids=repr)
    def test_the_model_is_as_before(self, importance):
        model, batch = deep(attention_dropout=0.5).train(), padded()
        before = everything(model)
        scored(model, [batch], importance)
        bh.plan(model, importance, [batch], blocks=2, greedy=True)
        assert everything(model) == before

    @pytest.mark.parametrize("importance", EVERY, ids=repr)
    def test_one_at_a_time_is_ranking_again_without_it(self, importance):
        model, batch = deep(), padded()
        small, left, expected = copy.deepcopy(model), list(range(5)), []
        for _ in range(3):
            if isinstance(importance, bh.importance.BlockInfluence):
                scores = influence(small, batch)
            else:
                labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0), -100)
                labels[1, 3] = -100  # the first token, which padding stands before
                gone = [without(small, LAYERS, [n]) for n in range(len(left))]
                scores = torch.stack([one(**batch, labels=labels).loss.detach() for one in gone])
            lowest = 1 + int(scores[1:].argmin())
            expected.append(left.pop(lowest))
            small = without(small, LAYERS, [lowest])
        plan = bh.plan(model, importance, [batch], amount=bh.Amount(blocks=3, first=1), greedy=True)
        assert plan.units == {LAYERS: sorted(expected)}

    def test_refused(self):
        model, batch = deep(), {"input_ids": tokens()}
        with pytest.raises(ValueError, match="batches: BlockInfluence needs at least one batch with non-padding tokens"):
            scored(model, [])
        with pytest.raises(
            ValueError,
            match="importance=BlockInfluence\\(\\) scores only blocks, and the units of model.layers.0.self_attn are heads",
        ):
            bh.score(model, bh.find_units(model, "head"), bh.importance.BlockInfluence(), [batch])
        for importance in (bh.OutputNorm(), bh.importance.GateGradient(), bh.OBS()):
            with pytest.raises(ValueError, match=r"\(blocks\) have none. Use BlockInfluence, Ablation, or RandomUnits"):
                scored(model, [batch], importance)
        for importance in (bh.Taylor(), bh.importance.WeightNorm()):
            with pytest.raises(ValueError, match="of blocks, BlockInfluence, Ablation and RandomUnits work"):
                scored(model, [batch], importance)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
        for importance in EVERY:
            with pytest.raises(ValueError, match=f"a score of {LAYERS} is NaN or infinite"):
                scored(model, [batch], importance)
        with pytest.raises(ValueError, match=f"blocks: there is no module 'layers'; there are 0 to 0, in this order: {LAYERS}"):
            bh.mask(model, {"layers": [1]}, "block")
        with pytest.raises(ValueError, match="blocks=5 would remove 5 of 5 blocks of model.layers. At most 4 can be removed"):
            bh.plan(model, batches=[batch], blocks=5, greedy=True)


class TestPlan:
    def test_the_lowest_but_for_the_protected(self):
        scores = {LAYERS: torch.tensor([0.0, 0.5, 0.2, 0.2, 0.1])}
        model = deep()

        def chosen(**amount):
            return bh.plan(model, scores=scores, amount=bh.Amount(**amount)).units

        assert chosen(blocks=2) == {LAYERS: [0, 4]}
        assert chosen(blocks=2, first=1) == {LAYERS: [3, 4]}
        assert chosen(blocks=0.41, first=1, last=1) == {LAYERS: [2, 3]}
        assert chosen(blocks=0.6) == {LAYERS: [0, 3, 4]}  # 0.6 * 5 is not quite 3

    def test_over_all_stacks_the_lowest_go(self):
        scores = {"encoder.block": torch.tensor([3.0, 2.0, 9.0]), "decoder.block": torch.tensor([8.0, 1.0, 7.0, 6.0])}
        model = t5()
        assert bh.plan(model, scores=scores, blocks=1).units == {"encoder.block": [1], "decoder.block": [1]}
        plan = bh.plan(model, scores=scores, amount=bh.Amount(blocks=0.3, ranking="global", first=1))
        assert plan.units == {"encoder.block": [1], "decoder.block": [1]}  # two of seven

    def test_it_says_what_happens_and_is_plain_data(self):
        model = deep()
        plan = bh.plan(model, scores={LAYERS: torch.tensor([1.0, 0.25, 1.0, 0.125, 1.0])}, blocks=2)
        block = sum(p.numel() for p in model.model.layers[0].parameters())
        assert plan.parameters == (model.num_parameters(), model.num_parameters() - 2 * block)
        assert plan.fields == {"num_hidden_layers": 3}
        assert (plan.before, plan.after, plan.kinds) == ({LAYERS: (5,)}, {LAYERS: (3,)}, {LAYERS: "block"})
        shown = str(plan)
        assert f"{LAYERS}  5 -> 3 blocks; without 1 (0.25), 3 (0.125)" in shown
        assert f"{plan.parameters[0]:,} -> {plan.parameters[1]:,} parameters" in shown
        again = bh.ModelPlan.from_json(json.loads(json.dumps(plan.to_json())), model)
        assert again == plan
        assert str(again) == shown
        bh.apply(model, again)
        assert (len(model.model.layers), model.num_parameters()) == (3, plan.parameters[1])

    @pytest.mark.parametrize("change", [lambda m: remove(m, [0]), lambda m: bh.convert_kv_heads(m, 1)])
    def test_a_stale_plan(self, change):
        model = deep()
        plan = bh.pruning.plan_units(model, [1, 3], "block")
        change(model)
        before = everything(model)
        match = f"made for a LlamaForCausalLM with 5 blocks in {LAYERS}; this LlamaForCausalLM has"
        with pytest.raises(ValueError, match=match):
            bh.apply(model, plan)
        with pytest.raises(ValueError, match=match):
            bh.ModelPlan.from_json(plan.to_json(), model)
        assert everything(model) == before

    def test_one_that_was_tampered_with(self):
        model = deep()
        plain = bh.pruning.plan_units(model, [1], "block").to_json()
        plain["fields"]["num_hidden_layers"] = 3
        with pytest.raises(ValueError, match="do not match the removal of these blocks"):
            bh.ModelPlan.from_json(plain, model)

    SCORES = {"scores": {LAYERS: torch.ones(5)}}
    REFUSED = [
        ({"blocks": 1, "scores": {"h": torch.ones(5)}}, f"{LAYERS} needs one score for each of its 5 blocks"),
        ({"blocks": 1, "scores": {LAYERS: torch.ones(4)}}, f"{LAYERS} needs one score for each of its 5 blocks"),
        ({"blocks": 1, "channels": 0.5}, "blocks=1 cannot be combined with channels"),
        ({"amount": bh.Amount(blocks=3, first=2, last=1), **SCORES}, "would remove 3 of 5 blocks .* At most 2 can be removed"),
        ({"blocks": -1, **SCORES}, "blocks=-1 must be a whole number of at least 0"),
        ({"blocks": 0, **SCORES}, "nothing to remove"),
        ({"blocks": True, **SCORES}, "blocks=True must be a number or None"),
        ({"blocks": 1.0, **SCORES}, r"blocks=1.0 must be a fraction of these units in \[0, 1\)"),
        ({"blocks": 1, "amount": bh.Amount(blocks=1), **SCORES}, "amount cannot be combined with blocks"),
        ({"channels": 0.5, "greedy": True}, "greedy=True requires blocks"),
    ]

    @pytest.mark.parametrize(("given", "message"), REFUSED)
    def test_refused(self, given, message):
        with pytest.raises(ValueError, match=message):
            bh.plan(deep(), **given)

    @pytest.mark.parametrize(("blocks", "message"), [
        ([5], f"{LAYERS} has no block 5; it has 0 to 4"), ([True], "has no block True"),
        ({"layers": [0]}, "there is no module 'layers'"), (range(5), f"{LAYERS} would be left without blocks"),
    ])  # fmt: skip
    def test_blocks_that_may_not_be_removed(self, blocks, message):
        with pytest.raises(ValueError, match=message):
            bh.pruning.plan_units(deep(), blocks, "block")

    def test_blocks_are_planned_alone(self):
        with pytest.raises(ValueError, match="blocks cannot be combined with other kinds"):
            bh.pruning.plan_units(deep(), {0: [0]}, ["head", "block"])

    def test_stages_are_found(self):
        model = other("SegformerForImageClassification")  # other lists hold as many numbers, and others are as large
        plan = bh.pruning.plan_units(model, {number: [1] for number in range(4)}, "block")
        assert plan.fields == {"depths": (1, 1, 1, 1)}
        assert bh.pruning.plan_units(model, {2: [0]}, "block").fields == {"depths": (2, 2, 1, 2)}

    @pytest.mark.parametrize("name", ["Wav2Vec2ForCTC", "HubertForCTC"])
    def test_strides_that_equal_the_number_of_blocks_stay(self, name):
        model = other(name)
        assert model.config.conv_stride == (2, 2)
        assert bh.pruning.plan_units(model, [1], "block").fields == {"num_hidden_layers": 1}

    def test_a_model_that_then_cannot_generate_is_refused_beforehand(self):
        model = other("GraniteMoeHybridForCausalLM")  # its cache asks the attention layer how long it is
        before = everything(model)
        with pytest.raises(ValueError, match="does not run without .*1.* if a KV cache is used.*: ValueError"):
            bh.pruning.plan_units(model, [1], "block")
        assert everything(model) == before

    def test_two_stacks_must_be_told_apart(self):
        with pytest.raises(ValueError, match=r"blocks: numbers without a module, .*; there are encoder.block, decoder.block"):
            bh.pruning.plan_units(t5(), [1], "block")


def remove(model, blocks, optimizers=()):
    return bh.pruning.prune_units(model, blocks, optimizers, kind="block")


REMOVED = {
    "llama": (lambda: deep(), {LAYERS: [0, 3]}),
    "mixtral": (lambda: build("mixtral", num_hidden_layers=3), {LAYERS: [1]}),
    "gemma3": (lambda: build("gemma3_text", num_hidden_layers=4, **MIXED), {LAYERS: [0, 1]}),
    "qwen2": (lambda: build("qwen2", num_hidden_layers=4, use_sliding_window=True, **MIXED), {LAYERS: [2]}),
    "gpt2": (lambda: gpt2(n_layer=4), {"transformer.h": [1, 2]}),
    "bert": (lambda: bert(num_hidden_layers=4), {"bert.encoder.layer": [0]}),
    "t5": (t5, {"encoder.block": [2], "decoder.block": [1, 3]}),
    "lists of two stacks": (lambda: other("T5GemmaForConditionalGeneration"), {"model.encoder.layers": [0]}),
    "vit": (lambda: other("ViTForImageClassification", num_hidden_layers=3), {"vit.layers": [1]}),
    "swin": (lambda: other("SwinForImageClassification"), {"swin.encoder.layers.2.blocks": [1]}),
    "whisper": (
        lambda: other("WhisperForConditionalGeneration"), {"model.encoder.layers": [1], "model.decoder.layers": [0]}
    ),
    "a list of those without experts": (
        lambda: build("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[0, 2]), {LAYERS: [1, 2]}
    ),
    "a number of first ones without experts": (
        lambda: other("DeepseekV2ForCausalLM", num_hidden_layers=4, first_k_dense_replace=2), {LAYERS: [0, 3]}
    ),
    "layers that differ": (lambda: uneven_llama(num_hidden_layers=4), {LAYERS: [0, 3]}),
}  # fmt: skip


def inputs_of(model):
    return {name: value for name, value in make_inputs(model).items() if isinstance(value, torch.Tensor)}


class TestRemoval:
    @pytest.mark.daily("llama", "mixtral", "gpt2", "t5", "swin", "layers that differ")
    @pytest.mark.parametrize("family", REMOVED)
    def test_it_equals_skipping_and_survives_a_round_trip(self, family, tmp_path):
        make, gone = REMOVED[family]
        model = make()
        inputs, generation = inputs_of(model), getattr(model, "generation_config", None)
        with torch.no_grad(), skipping(model, gone) as runs:
            expected = model(**inputs).logits
        assert set(runs.values()) == {1}
        counts = {name: len(stack) - len(gone.get(name, ())) for name, stack in find_blocks(model).items()}
        plan = remove(model, gone)
        assert {name: len(stack) for name, stack in find_blocks(model).items()} == counts
        assert plan.parameters[1] == model.num_parameters()
        assert getattr(model, "generation_config", None) is generation
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
            saved = bh.save(model, tmp_path / "out", probe=inputs)
            plain = family != "layers that differ"
            assert saved.way == ("plain" if plain else "shaped")
            loaded = type(model).from_pretrained(tmp_path / "out") if plain else bh.load(tmp_path / "out")
            assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
        assert shape_of(loaded).attributes == shape_of(model).attributes

    @pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2", "gpt2", "t5", "mixtral"])
    def test_generation_with_a_cache_equals_generation_without(self, family):
        make, gone = REMOVED[family]
        model = make()
        remove(model, gone)
        ids = tokens(2, 9)
        told = {
            "max_new_tokens": 8,
            "min_new_tokens": 8,
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        cached, bare = (model.generate(ids, **told, use_cache=cache) for cache in (True, False))
        assert torch.equal(cached.sequences, bare.sequences)
        torch.testing.assert_close(torch.stack(cached.logits), torch.stack(bare.logits), rtol=1e-4, atol=1e-4)
        layers = getattr(cached.past_key_values, "self_attention_cache", cached.past_key_values).layers
        assert len(layers) == len(list(find_blocks(model).values())[-1])

    def test_the_optimizer_follows(self):
        model = deep()
        groups = [{"params": [p for p in model.parameters() if p.ndim == n], "lr": 1e-3 * n} for n in (1, 2)]
        optimizer = torch.optim.AdamW(groups)
        ids = tokens()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        named = {id(p): name for name, p in model.named_parameters()}
        moments = {p: own["exp_avg"].clone() for p, own in optimizer.state.items()}
        lists = [group["params"] for group in optimizer.param_groups]
        orders = [[named[id(p)] for p in own if not named[id(p)].startswith((f"{LAYERS}.1.", f"{LAYERS}.4."))] for own in lists]
        remove(model, [1, 4], optimizer)
        for own, order in zip(lists, orders, strict=True):
            assert [named[id(p)] for p in own] == order
        assert {id(p) for own in lists for p in own} == {id(p) for p in model.parameters()} == {id(p) for p in optimizer.state}
        assert all(torch.equal(own["exp_avg"], moments[p]) for p, own in optimizer.state.items())
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()

    def test_with_adapters(self):
        torch.manual_seed(1)
        adapted = peft.get_peft_model(deep(), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
        ids = tokens()
        with torch.no_grad(), skipping(find_transformer(adapted), {LAYERS: [2]}):
            expected = adapted(ids).logits
        remove(adapted, [2])
        with torch.no_grad():
            torch.testing.assert_close(adapted(ids).logits, expected)
        assert not any("layers.4." in name for name, _ in adapted.named_parameters())


REFUSED = {
    "position bias": (
        t5, {"encoder.block": [0]}, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight is .* in the model"
    ),
    "shared": (
        lambda: other("AlbertForMaskedLM", num_hidden_layers=4, num_hidden_groups=2),
        {"albert.encoder.albert_layer_groups": [1]}, "block 1 of .* runs 2 times per forward pass: its weights are shared",
    ),
    "tied": (lambda: tied(), {LAYERS: [1]}, "block 1 of .* shares weights with .*layers.2.mlp.up_proj.weight, which stays"),
    "its place": (
        lambda: other("BeamForCausalLM", num_hidden_layers=3), {LAYERS: [0]}, "computes something else without .*later blocks"
    ),
    "a constant": (
        lambda: gpt2(n_layer=3, scale_attn_by_inverse_layer_idx=True), {"transformer.h": [0]},
        "its class then builds transformer.h.0.attn.scaling = 0.35.*, but the block moved there has 0.17",
    ),
    "a period": (
        lambda: build("qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2), {LAYERS: [1]}, "is missing in the model"
    ),
    "a table for all": (
        lambda: other("Gemma4ForCausalLM", num_hidden_layers=3), {LAYERS: [0]}, "cannot express that blocks 0 .* are removed"
    ),
    "the config is of another": (lambda: unlike(), {LAYERS: [0]}, "has other blocks than its class builds"),
}  # fmt: skip


def tied():
    model = deep()
    model.model.layers[1].mlp.up_proj = model.model.layers[2].mlp.up_proj
    return model


def unlike():
    model = deep()
    model.config.num_hidden_layers = 6
    return model


class TestRefused:
    @pytest.mark.parametrize("why", REFUSED)
    def test_with_the_reason_and_nothing_changes(self, why):
        make, gone, message = REFUSED[why]
        model = make()
        optimizer = torch.optim.AdamW(model.parameters())
        before = everything(model, optimizer)
        with pytest.raises(ValueError, match=message):
            remove(model, gone, optimizer)
        assert everything(model, optimizer) == before


class TestShape:
    """Checkpoints of a model with fewer blocks load into one that has them all, and the other way round."""

    @pytest.mark.parametrize("family", ["llama", "gemma3", "t5", "layers that differ", "gpt2"])
    def test_both_ways(self, family):
        make, gone = REMOVED[family]
        dense, other = make(), make()
        small, inputs = copy.deepcopy(dense), inputs_of(dense)
        remove(small, gone)
        twice = copy.deepcopy(small)
        bh.pruning.prune_units(twice, {next(iter(gone)): [0] if family != "t5" else [1]}, kind="block")
        for target in (small, dense, twice, small, dense):
            checkpoint = {}
            save_shape(target, checkpoint)
            load_shape(other, json.loads(json.dumps(checkpoint)))
            other.load_state_dict(target.state_dict())
            assert shape_of(other) == shape_of(target)
            said, expected = other.config.to_dict(), target.config.to_dict()
            said.pop("billhook", None), expected.pop("billhook", None)  # what was changed by hand says nothing there
            assert said == expected
            with torch.no_grad():
                assert torch.equal(other(**inputs).logits, target(**inputs).logits)
            parts = {id(c) for m in other.modules() for c in vars(m).values() if isinstance(c, transformers.PretrainedConfig)}
            assert parts <= {id(other.config)} or family == "t5"

    def test_blocks_that_are_there_stay_the_very_ones_and_adapters_come_back(self):
        model = peft.get_peft_model(deep(), peft.LoraConfig(target_modules=["q_proj"])).base_model.model
        dense, blocks = shape_of(model), list(model.model.layers)
        remove(model, [1, 2])
        small = shape_of(model)
        set_shape(model, dense)
        assert [model.model.layers[n] is blocks[n] for n in range(5)] == [True, False, False, True, True]
        assert all(p.device.type == "cpu" for p in model.parameters())
        assert model.model.layers[1].self_attn.q_proj.lora_A.default.weight.requires_grad
        set_shape(model, small)
        assert list(model.model.layers) == [blocks[n] for n in (0, 3, 4)]

    def test_another_model_is_refused_and_nothing_changes(self):
        small, dense, third = llama(num_hidden_layers=4), deep(), shape_of(llama(num_hidden_layers=3))
        remove(small, [0])
        before = everything(dense)
        with pytest.raises(ValueError, match=f"{LAYERS} had 4 blocks originally, but 5 in LlamaForCausalLM"):
            set_shape(dense, shape_of(small))
        cut = copy.deepcopy(dense)
        remove(cut, [0])
        with pytest.raises(ValueError, match="the checkpoint contains a different model"):
            set_shape(cut, third)
        assert everything(dense) == before
        assert len(cut.model.layers) == 4

    def test_heads_go_from_a_model_that_has_lost_blocks(self):
        model = deep()
        remove(model, [1])
        bh.convert_kv_heads(model, 1)
        bh.pruning.prune_units(model, {0: [0, 1]})
        assert shape_of(model).blocks == {LAYERS: (5, (0, 2, 3, 4))}
        other = deep()
        set_shape(other, shape_of(model))
        other.load_state_dict(model.state_dict())
        ids = tokens()
        assert torch.equal(other(ids).logits, model(ids).logits)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_torchscript_module_inside():
    """Its tables are no dictionaries of Python's: one that stays as it is neither stops a removal nor its undoing."""
    model = deep()
    model.model.layers[0].mlp.act_fn = torch.jit.script(nn.SiLU())
    bh.pruning.prune_units(model, [1], kind="block")
    assert len(model.model.layers) == model.config.num_hidden_layers == 4
    model(tokens())
