"""Without heads a model computes what it does with them masked; weights, optimizers, config and checkpoints follow."""

import copy

import oracle
import peft
import pytest
import torch
import transformers
from small_configs import build as small
from small_configs import small_config
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

import billhook as bh
from billhook.model.shape import shape_of
from billhook.units.find import find_units
from kit.families import build, llama, tokens
from kit.removal import ALIKE, TestNothingIsHalfDone, counts, make, questions, some_heads
from kit.shaped import bert, gpt2
from kit.units import FAMILIES, other

NONE = ("mamba", "recurrent_gemma", "convnext", "resnet")  # without attention
REFUSED = ("bloom", "mpt", "olmo2", "mamba2", "codegen")  # in test_cut_heads
REMOVABLE = [family for family in FAMILIES if family not in (*NONE, *REFUSED)]
REMOVABLE += ["T5ForConditionalGeneration", "BartForConditionalGeneration", "WhisperForConditionalGeneration"]
GENERATE = ["llama", "gpt2", "opt", "gpt_neox", "phi3", "bart", "t5", "qwen2", "mixtral"]


def implementations(model):
    """The ways in which a model can compute its attention; sdpa caps no scores."""
    for implementation in ("eager", "sdpa"):
        if implementation == "eager" or (model._supports_sdpa and not getattr(model.config, "attn_logit_softcapping", None)):
            model.set_attn_implementation(implementation)
            yield implementation


@torch.no_grad()
def answers(model, asked):
    """What a model says, whichever way it computes."""
    before, found = model.config._attn_implementation, {}
    for implementation in implementations(model):
        for number, inputs in enumerate(asked):
            found[implementation, number] = oracle.answer(model(**inputs))
    model.set_attn_implementation(before)
    return found


def assert_same(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    assert found
    for key in expected:
        assert oracle.difference(found[key], expected[key]) < tolerance, key


def assert_removes(model, chosen, per="head"):
    """Sliced equals masked, and does not equal what it was."""
    asked = questions(model)
    whole = answers(model, asked)
    with bh.mask(model, chosen, per=per):
        expected = answers(model, asked)
    plan = bh.pruning.prune_units(model, chosen, per=per)
    found = answers(model, asked)
    assert_same(found, expected)
    assert counts(model) == plan.after != plan.before
    assert all(oracle.difference(found[key], whole[key]) > 1e-3 for key in whole)
    return plan


class TestSlicedEqualsMasked:
    @pytest.mark.daily("llama", "gemma2", "phi3", "gpt2", "gpt_neox", "mixtral", "bert", "t5")
    @pytest.mark.parametrize("name", REMOVABLE)
    def test_in_every_family(self, name):
        model = make(name)
        heads = {one: own for one, own in find_units(model, "head").items() if not one.endswith("mamba")}
        assert_removes(model, some_heads(heads, alike=name in ALIKE))

    @pytest.mark.daily("llama", "phi3")
    @pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "dbrx", "glm4", "phi3"])
    def test_by_kv_heads_and_then_by_query_heads(self, name):
        model, alike = make(name), name in ALIKE
        names = list(find_units(model, "head"))
        assert_removes(model, {names[0]: [1], names[1]: [0]} if alike else {names[1]: [0]}, per="kv_head")
        assert_removes(model, {names[0]: [2], names[1]: [0]} if alike else {names[0]: [1, 5], names[1]: [0, 2]})

    @pytest.mark.daily("llama", "T5*")
    @pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "T5ForConditionalGeneration"])
    def test_down_to_one_head(self, name):
        model = make(name)  # of six heads
        plan = assert_removes(model, {one: [0, 1, 2, 3, 4] for one in find_units(model, "head")})
        assert set(plan.after.values()) == {(1, 1)}

    @pytest.mark.daily("gpt2", "t5")
    @pytest.mark.parametrize("name", ["qwen2", "dbrx", "gpt2", "bert", "t5"])
    def test_numbers_that_mean_several_things(self, name):
        """As many heads as a head has dimensions, as many KV heads as each has query heads, and layers up to as many."""
        changes = {
            "qwen2": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3},
            "dbrx": {"d_model": 64, "n_heads": 16, "n_layers": 3, "max_seq_len": 64},
            "gpt2": {"n_embd": 36, "n_head": 6, "n_layer": 7},
            "bert": {"hidden_size": 36, "num_attention_heads": 6},
            "t5": {"d_model": 64, "d_kv": 8, "num_heads": 8},
        }[name]
        if name == "dbrx":
            attention = {"clip_qkv": 8, "kv_n_heads": 4, "rope_theta": 10000.0}
            feed = {"hidden_size": 64, "ffn_hidden_size": 80, "moe_num_experts": 4, "moe_top_k": 2}
            changes |= {"attn_config": attention, "ffn_config": feed}
        model = make(name, **changes)
        before = shape_of(model).attributes
        chosen = some_heads(find_units(model, "head"))
        if name == "dbrx":  # 3 KV heads of 4 stay with 2 query heads each of 4
            chosen = {one: [0, 1, 2, 3, 4, 6, 9, 10, 12, 15] for one in chosen}
        assert_removes(model, chosen)
        after = shape_of(model).attributes
        constant = ("layer_idx", "head_dim", "attention_head_size", "key_value_proj_dim", "max_position_embeddings")
        assert {key for key in before if key.endswith(constant) and before[key] != after[key]} == set()
        for key, value in after.items():
            if key.endswith("num_key_value_groups"):
                query, kv = counts(model)[key.rpartition(".")[0]]
                assert value == query // kv

    def test_in_half_precision_no_number_is_mistaken(self):
        """Other logits are within the rounding of bfloat16, where few dimensions are rotated by less than they were."""
        model = small(small_config(transformers.StableLmConfig), transformers.StableLmForCausalLM).bfloat16()
        rotary = {f"model.layers.{layer}.self_attn.rotary_ndims": 2 for layer in (0, 1)}  # and two KV heads
        assert rotary.items() <= shape_of(model).attributes.items()
        plan = bh.pruning.prune_units(model, {0: [0], 1: [1]}, per="kv_head")
        assert set(plan.after.values()) == {(3, 1)}
        assert rotary.items() <= shape_of(model).attributes.items()
        assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}

    def test_layers_that_may_not_differ(self):
        model = make("phi3")
        before = {name: id(p) for name, p in model.named_parameters()}, shape_of(model)
        with pytest.raises(ValueError, match="heads cannot be removed from Phi3ForCausalLM: its forward pass does not work"):
            bh.pruning.prune_units(model, {0: [0]}, per="kv_head")
        assert ({name: id(p) for name, p in model.named_parameters()}, shape_of(model)) == before
        plan = bh.pruning.prune_units(model, {0: [0], 1: [1]}, per="kv_head")
        assert set(plan.after.values()) == {(3, 1)}
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (3, 1)

    def test_a_model_inside_another_module_and_a_part_of_it(self):
        outer = nn.Module()
        outer.model = llama()
        assert bh.pruning.prune_units(outer, {0: [0, 1]}).after == counts(outer.model)
        encoder = transformers.T5EncoderModel(transformers.T5Config(d_model=32, d_kv=8, num_heads=4, num_layers=2, vocab_size=64))
        assert_removes(encoder.eval().double(), {0: [1, 2], 1: [1, 2]})


class TestGeneration:
    @pytest.mark.daily("llama", "gpt2", "t5", "mixtral")
    @pytest.mark.parametrize("name", GENERATE)
    def test_from_a_cache_and_with_beams(self, name):
        model = make({"bart": "BartForConditionalGeneration", "t5": "T5ForConditionalGeneration"}.get(name, name))
        self.check(model, some_heads(find_units(model, "head"), alike=name in ALIKE))

    @torch.no_grad()
    def check(self, model, chosen):
        ids = torch.randint(11, 100, (2, 6), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[1, :2] = 0
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        options |= {"decoder_start_token_id": 0} if model.config.is_encoder_decoder else {}
        options |= {"output_scores": True, "return_dict_in_generate": True, "attention_mask": mask}
        ways = [{"use_cache": True}, {"use_cache": False}, {"num_beams": 3}]
        with bh.mask(model, chosen):
            expected = [model.generate(ids, **options, **way) for way in ways]
        bh.pruning.prune_units(model, chosen)
        for way, one in zip(ways, expected, strict=True):
            found = model.generate(ids, **options, **way)
            assert torch.equal(found.sequences, one.sequences)
            torch.testing.assert_close(found.scores, one.scores, rtol=1e-6, atol=1e-5)
        assert torch.equal(expected[0].sequences, expected[1].sequences)

    def test_seq2seq_from_states_of_the_encoder(self):
        model = make("BartForConditionalGeneration")
        heads = list(find_units(model, "head"))
        cross = {name: [0, 5] for name in heads if "encoder_attn" in name}
        own = {name: [1] for name in heads if "decoder" in name and "self_attn" in name}
        states = torch.randn(2, 7, 48, dtype=torch.double)
        asked = {"encoder_outputs": BaseModelOutput(states), "decoder_input_ids": tokens(2, 4)}
        with torch.no_grad(), bh.mask(model, cross | own):
            expected = model(**asked).logits
        bh.pruning.prune_units(model, cross | own)
        torch.testing.assert_close(model(**asked).logits, expected)


class TestWeights:
    """Against slices made by hand."""

    def test_llama(self):
        model, size = llama().eval(), 4  # 8 query heads, 4 KV heads
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        bh.pruning.prune_units(model, {0: [0, 1, 2, 4, 7], 1: [1, 2, 4, 6]})
        stays = {0: ([3, 5, 6], [1, 2, 3]), 1: ([0, 3, 5, 7], [0, 1, 2, 3])}
        for name, parameter in model.named_parameters():
            expected = before[name]
            if "self_attn" in name:
                layer, kind = int(name.split(".")[2]), name.split(".")[-2]
                query, kv = ([head * size + i for head in own for i in range(size)] for own in stays[layer])
                expected = {
                    "q_proj": lambda w, q=query: w[q],
                    "k_proj": lambda w, k=kv: w[k],
                    "v_proj": lambda w, k=kv: w[k],
                    "o_proj": lambda w, q=query: w[:, q],
                }[kind](expected)
            assert torch.equal(parameter, expected), name
            assert parameter.is_contiguous()
            assert parameter.is_leaf
        attention = model.model.layers[1].self_attn
        assert (attention.q_proj.out_features, attention.k_proj.out_features, attention.o_proj.in_features) == (16, 16, 16)
        assert [layer.self_attn.num_key_value_groups for layer in model.model.layers] == [1, 1]

    def test_weights_that_layers_share(self):
        model = make("albert")
        before = model.num_parameters()
        plan = assert_removes(model, {0: [1, 4]})
        assert plan.parameters == (before, model.num_parameters())


class TestOptimizer:
    @staticmethod
    def steps(model, optimizer, count):
        for step in range(count):
            ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(step + int(model.training)))
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()

    def test_several_optimizers(self):
        model = gpt2().train()
        attention = [p for name, p in model.named_parameters() if "attn" in name]
        others = [p for name, p in model.named_parameters() if "attn" not in name]
        optimizers = [torch.optim.AdamW(attention, 1e-2), torch.optim.SGD(others, 1e-2, momentum=0.9)]
        model(tokens(), labels=tokens()).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        bh.pruning.prune_units(model, {0: [0, 1]}, iter(optimizers))
        assert {id(p) for o in optimizers for g in o.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
        assert all(v.shape == p.shape for p, s in optimizers[0].state.items() for v in s.values() if v.dim())
        model(tokens(), labels=tokens()).loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    def test_state_of_another_size_starts_anew(self):
        model = llama().train()
        optimizer = transformers.Adafactor(model.parameters(), lr=1e-2, relative_step=False, scale_parameter=False)
        self.steps(model, optimizer, 2)
        with pytest.warns(UserWarning, match="Adafactor keeps 'exp_avg_sq_row' of size .* it cannot follow"):
            bh.pruning.prune_units(model, {0: [0, 1]}, optimizer)
        self.steps(model, optimizer, 1)


class TestAdapters:
    TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")

    @pytest.mark.parametrize("chosen", [{0: [0, 1, 4, 5], 1: [2, 3, 6, 7]}, {1: [1, 2, 5, 6]}], ids=["whole", "each"])
    def test_lora(self, chosen):
        torch.manual_seed(1)
        config = peft.LoraConfig(target_modules=list(self.TARGETS), r=2, init_lora_weights=False)
        model, ids = peft.get_peft_model(llama(), config).eval().double(), tokens()
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        merged = copy.deepcopy(model).merge_and_unload()
        with torch.no_grad(), bh.mask(model, chosen):
            expected = model(ids).logits
            with model.disable_adapter():
                off = model(ids).logits
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        model(ids, labels=ids).loss.backward()
        whole = {name: p.detach().clone() for name, p in model.named_parameters()}
        plan = bh.pruning.prune_units(model, chosen, optimizer)
        torch.testing.assert_close(model(ids).logits, expected)
        with model.disable_adapter():
            torch.testing.assert_close(model(ids).logits, off)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
        assert plan.after == counts(model)

        (query, kv), layer = plan.after["model.layers.1.self_attn"], model.base_model.model.model.layers[1].self_attn
        shapes = {name: (tuple(own.lora_A.default.weight.shape), tuple(own.lora_B.default.weight.shape))
                  for name, own in layer.named_children() if name in self.TARGETS}  # fmt: skip
        assert shapes["q_proj"] == ((2, 32), (4 * query, 2))
        assert shapes["k_proj"] == shapes["v_proj"] == ((2, 32), (4 * kv, 2))
        assert shapes["o_proj"] == ((2, 4 * query), (32, 2))
        assert (layer.q_proj.out_features, layer.o_proj.in_features) == (4 * query, 4 * query)
        assert layer.o_proj.lora_A.default.in_features == layer.o_proj.base_layer.in_features == 4 * query
        rows = [4 * head + i for head in range(8) if head not in chosen[1] for i in range(4)]
        name = "base_model.model.model.layers.1.self_attn.{}.default.weight"
        assert torch.equal(layer.q_proj.lora_B.default.weight, whole[name.format("q_proj.lora_B")][rows])
        assert torch.equal(layer.o_proj.lora_A.default.weight, whole[name.format("o_proj.lora_A")][:, rows])

        bh.pruning.prune_units(merged, chosen)
        torch.testing.assert_close(merged(ids).logits, expected)
        torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(ids).logits, expected)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters() if p.requires_grad}

    def test_dora(self):
        def dora(*targets):
            config = peft.LoraConfig(target_modules=list(targets), r=2, use_dora=True, init_lora_weights=False)
            return peft.get_peft_model(llama(), config).eval().double()

        model, ids = dora("q_proj", "v_proj"), tokens()
        with torch.no_grad(), bh.mask(model, {0: [0, 1], 1: [1, 2, 4, 6]}):
            expected = model(ids).logits
        bh.pruning.prune_units(model, {0: [0, 1], 1: [1, 2, 4, 6]})
        torch.testing.assert_close(model(ids).logits, expected)
        with pytest.raises(ValueError, match=r"removed from .*: a norm spans all of them"):  # of the columns that are read
            bh.pruning.prune_units(dora("o_proj"), {0: [0, 1]})


class OwnConfig(transformers.PretrainedConfig):
    model_type = "own"

    def __init__(self, heads=4, fixed="", vocab_size=64, **kwargs):
        self.heads, self.fixed, self.vocab_size = heads, fixed, vocab_size
        super().__init__(**kwargs)


class OwnAttention(nn.Module):
    """Scores times a buffer, one number a head."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.fixed = config.heads, config.fixed
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.register_buffer("sharpness", torch.linspace(0.5, 2, self.heads))

    def forward(self, x):
        heads = 4 if self.fixed == "view" else self.heads
        q, k, v = (each(x).view(*x.shape[:2], heads, -1).transpose(1, 2) for each in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) * self.sharpness.view(-1, 1, 1)
        if self.fixed == "scale":
            scores = scores / self.q.out_features**0.5
        out = (scores.softmax(-1) @ v).transpose(1, 2)
        return self.o(out.reshape(*x.shape[:2], 32 if self.fixed == "width" else -1))


class OwnModel(transformers.PreTrainedModel):
    """Somebody's own, whose code may say what its config should."""

    config_class = OwnConfig
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, 32)
        self.layers = nn.ModuleList(OwnAttention(config) for _ in range(2))
        self.head = nn.Linear(32, config.vocab_size)
        self.post_init()

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(x))


class TestCodeOfSomebodysOwn:
    @staticmethod
    def own(**changes):
        model = OwnModel(OwnConfig(**changes)).double().eval()
        oracle.randomise(model)
        return model

    def test_buffers_follow(self):
        model, ids = self.own(), tokens()
        with bh.mask(model, {0: [0], 1: [1, 2]}):
            expected = model(ids).logits
        bh.pruning.prune_units(model, {0: [0], 1: [1, 2]})
        torch.testing.assert_close(model(ids).logits, expected)
        whole = torch.linspace(0.5, 2, 4, dtype=torch.double)
        assert torch.allclose(model.layers[0].sharpness, whole[1:])
        assert torch.allclose(model.layers[1].sharpness, whole[[0, 3]])
        assert [layer.heads for layer in model.layers] == [3, 2]

    @pytest.mark.parametrize("fixed", ["view", "width", "scale"])
    def test_code_that_does_not_follow_is_refused(self, fixed):
        model = self.own(fixed=fixed)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        before = TestNothingIsHalfDone.everything(model, optimizer)
        with pytest.raises(ValueError, match="heads cannot be removed from OwnModel: .* mask them instead"):
            bh.pruning.prune_units(model, {0: [0, 1], 1: [0, 2]}, optimizer)
        assert TestNothingIsHalfDone.everything(model, optimizer) == before
        with bh.mask(model, {0: [0, 1]}):
            model(tokens())


class TestRoundTrip:
    UNIFORM = {"llama": (4, 2), "qwen3": (4, 2), "mixtral": (4, 2), "t5": (2, 2)}

    @staticmethod
    def t5():
        config = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "vocab_size": 64}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**config, decoder_start_token_id=0)).eval()

    @staticmethod
    @torch.no_grad()
    def logits(model):
        more = {"decoder_input_ids": torch.arange(10).view(2, 5)} if model.config.is_encoder_decoder else {}
        return model(torch.arange(24).view(2, 12), **more).logits

    @pytest.mark.daily("llama", "t5")
    @pytest.mark.parametrize("name", UNIFORM)
    def test_alike_in_all_layers(self, name, tmp_path):
        model = self.t5() if name == "t5" else build(name)
        if name == "t5":
            bh.pruning.prune_units(model, dict.fromkeys(find_units(model, "head"), [1, 2]))
        else:
            bh.pruning.prune_units(model, {0: [0, 1], 1: [0, 3]}, per="kv_head")
        expected = self.logits(model)
        saved = bh.save(model, tmp_path / "a")
        assert (saved.way, saved.difference) == ("plain", 0)
        for again in (type(model).from_pretrained(tmp_path / "a"), bh.load(tmp_path / "a")):
            assert set(counts(again).values()) == {self.UNIFORM[name]}
            assert torch.equal(self.logits(again), expected)
        assert model.config.num_attention_heads == self.UNIFORM[name][0]
        if name != "t5":
            said = bh.summary(model)
            assert (said.query_heads, said.kv_heads) == self.UNIFORM[name]
            assert name == "mixtral" or said.kv_cache_bytes == 2 * 2 * 2 * model.model.layers[0].self_attn.head_dim * 4
            bh.pruning.prune_units(again, {0: [0, 2], 1: [1, 3]})  # pruned again, after loading
            assert set(counts(again).values()) == {(2, 2)}
            assert bh.save(again, tmp_path / "b").way == "plain"
            assert torch.equal(self.logits(bh.load(tmp_path / "b")), self.logits(again))

    @pytest.mark.daily("lora")
    @pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "lora"])
    def test_of_a_shape_that_the_config_does_not_say(self, name, tmp_path):
        model = {"bert": bert, "gpt2": gpt2, "llama": llama, "lora": llama}[name]()
        if name == "lora":
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "o_proj"], r=2)).eval()
        chosen = {0: [0, 1], 1: [2, 3, 4, 5]} if name in ("llama", "lora") else {0: [0], 1: [1, 2]}
        plan = bh.pruning.prune_units(model, chosen)
        model = model.merge_and_unload() if name == "lora" else model
        saved = bh.save(model, tmp_path / "a")
        assert (saved.way, saved.difference) == ("shaped", 0)
        again = bh.load(tmp_path / "a")
        assert torch.equal(self.logits(again), self.logits(model))
        assert shape_of(again) == shape_of(model)
        assert counts(again) == plan.after
        chosen = {0: [2, 3], 1: [0, 1]} if name in ("llama", "lora") else {0: [1], 1: [0]}
        ids = tokens()
        with torch.no_grad(), bh.mask(again, chosen):
            expected = again(ids).logits
        optimizer = torch.optim.SGD(again.parameters(), 0.1)
        bh.pruning.prune_units(again, chosen, optimizer)
        torch.testing.assert_close(again(ids).logits, expected)
        bh.pruning.prune_units(model, chosen)
        assert torch.equal(self.logits(again), self.logits(model))
        assert shape_of(again) == shape_of(model)
        assert bh.save(again, tmp_path / "b").difference == 0
        assert torch.equal(self.logits(bh.load(tmp_path / "b")), self.logits(again))

    @pytest.mark.daily("llama", "gpt2")
    @pytest.mark.parametrize("make_one", [llama, gpt2, bert])
    def test_trace_and_summary_of_what_is_left(self, make_one):
        model = make_one()
        before = bh.summary(model)
        plan = bh.pruning.prune_units(model, {1: [0, 1]})
        said, structure = bh.summary(model), bh.trace(model)
        assert (before.params, said.params) == plan.parameters
        assert not structure.opaque
        assert len(structure.attention) == 2
        sizes = sorted(group.size for group in structure.groups if group.kind in ("head", "kv_head"))
        assert sizes == sorted(kv for _, kv in plan.after.values())
        if before.kv_cache_bytes:
            assert said.flops < before.flops
            lost = {llama: 2 * 4 * 4, gpt2: 2 * 2 * 8 * 4}[make_one]  # keys and values of KV heads, in float32
            assert before.kv_cache_bytes - said.kv_cache_bytes == lost


@pytest.mark.parametrize(("name", "amounts", "fields"), [
    (
        "MoonshineForConditionalGeneration",
        {"heads": 0.34},
        {"encoder_num_attention_heads": 4, "head_dim": 8},
    ),
    ("DeepseekV3ForCausalLM", {"heads": 0.34}, {"num_attention_heads": 4, "num_key_value_heads": 4}),
    (
        "BailingHybridForCausalLM",
        {"heads": 0.34},
        {"num_attention_heads": 4, "num_key_value_heads": 4},
    ),
    ("Gemma4UnifiedForCausalLM", {"heads": 0.34}, {"num_attention_heads": 4}),  # its head size differs by layer
    ("ViTForImageClassification", {"heads": 0.34, "residual": 0.25}, {"num_attention_heads": 4, "hidden_size": 36}),
])  # fmt: skip
def test_the_config_says_the_new_head_counts(name, amounts, fields, tmp_path):
    """Also if the class refuses them with the old hidden size, or a count of KV heads that no tensor shows."""
    model = other(name)
    bh.apply(model, bh.plan(model, bh.importance.WeightNorm(), **amounts))
    assert bh.save(model, tmp_path).way == "plain"
    config = type(model).from_pretrained(tmp_path).config
    assert {field: getattr(config, field) for field in fields} == fields
