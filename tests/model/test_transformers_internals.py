"""The private names of transformers and torch that billhook uses are still there, and mean what they did."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils import _python_dispatch
from transformers import core_model_loading
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto

import billhook as bh
from billhook.engine.loader_internals import is_joined_unevenly
from billhook.model.config_fields import configs_of
from billhook.model.meta import MAPPINGS
from billhook.model.transformers_internals import (
    ATTENTION,
    attention_functions_as,
    attention_of,
    build_class,
    classes_of,
    compute_every_expert,
    has_sdpa,
    set_attention,
)
from kit.families import build, llama


def test_how_attention_is_computed():
    model = llama()
    model.set_attn_implementation("eager")
    assert vars(model.config)[ATTENTION] == attention_of(model.config) == "eager"
    set_attention(model.config, "sdpa")
    assert model.config._attn_implementation == "sdpa"
    assert has_sdpa(type(model))
    assert not has_sdpa(nn.Module)
    assert attention_of(transformers.LlamaConfig()) is None


def test_what_files_join():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = transformers.NomicBertForMaskedLM(transformers.NomicBertConfig(**sizes))
    assert not is_joined_unevenly(model)
    attention = next(module for name, module in model.named_modules() if name.endswith("self_attn"))
    attention.k_proj = nn.Linear(32, 8)
    assert is_joined_unevenly(model)
    assert not is_joined_unevenly(llama())


def test_a_release_without_a_private_name_is_told_where_that_is_needed(monkeypatch, tmp_path):
    model = llama()
    monkeypatch.delattr(core_model_loading, "Chunk")
    told = (
        rf"transformers {transformers.__version__}: cannot import name 'Chunk'.*, which billhook needs to save models.*\. Install"
    )
    with pytest.raises(ImportError, match=told):
        bh.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert bh.prune(model, bh.Magnitude(), sparsity=0.5)


def test_how_experts_are_computed():
    model = build("mixtral")
    compute_every_expert(model)
    assert {config._experts_implementation for config in configs_of(model)} == {"batched_mm"}
    model.set_experts_implementation("eager")
    assert model.config._experts_implementation == "eager"


def test_classes_are_found_and_built():
    assert transformers.LlamaForCausalLM in classes_of(transformers.AutoModelForCausalLM, llama().config)
    assert classes_of(transformers.AutoModelForCausalLM, transformers.ViTConfig()) == []
    built = build_class(transformers.LlamaForCausalLM, llama().config, torch.bfloat16)
    assert built.dtype == torch.bfloat16
    config = transformers.GPTJConfig(n_embd=32, n_layer=1, n_head=4, n_positions=64, rotary_dim=8, vocab_size=64, eos_token_id=1)
    tables = [build_class(transformers.GPTJForCausalLM, config, kind) for kind in (torch.float32, torch.bfloat16)]
    table, rounded = (model.transformer.rotary_emb.embed_positions for model in tables)
    assert torch.equal(table, rounded)  # as from_pretrained makes it
    assert all("llama" in getattr(modeling_auto, name) for name in ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_MAPPING_NAMES"))
    assert all(isinstance(getattr(modeling_auto, name), dict) for name in MAPPINGS)


def test_torch():
    x, op = torch.ones(2), torch.ops.aten.add.Tensor
    assert x[:1].untyped_storage()._cdata == x.untyped_storage()._cdata != torch.ones(2).untyped_storage()._cdata
    version = x._version
    x.add_(1)
    assert x._version > version
    assert (op._schema.name, op._overloadname) == ("aten::add", "Tensor")
    assert callable(_python_dispatch.TorchDispatchMode.__torch_dispatch__)
    assert callable(torch._foreach_mul_)
    assert callable(torch._C.DisableTorchFunctionSubclass)
    assert not nn.modules.module._has_any_global_hook()
    tables = {"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"}
    assert tables <= vars(nn.Linear(1, 1)).keys()
    assert callable(fully_shard)


def test_threads_that_listen_to_attention_do_not_remove_each_others_wrappers():
    missed, interval = [], sys.getswitchinterval()

    def listen(rank):
        for _ in range(500):
            seen = []
            with attention_functions_as(lambda function, *args, seen=seen: seen.append(rank)):
                ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)()
            missed.extend({rank} - set(seen))

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(listen, range(2)))
    finally:
        sys.setswitchinterval(interval)
    assert not missed
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)
