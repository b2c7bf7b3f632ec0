import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from billhook.tracing.trace import trace
from billhook.training.module import attention_parameters, freeze_others
from kit.families import build, llama


class Flat(PreTrainedModel):
    """One block whose attention and feed-forward lie side by side in one module, under names that say nothing."""

    config_class = transformers.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, width)
        self.before, self.norm = nn.LayerNorm(width), nn.RMSNorm(8)
        self.a, self.b, self.c, self.d = (nn.Linear(width, width) for _ in range(4))
        self.e, self.f = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.post_init()

    def forward(self, input_ids):
        x = self.embed(input_ids)
        y = self.before(x)
        q, k, v = (one(y).unflatten(-1, (4, 8)).transpose(1, 2) for one in (self.a, self.b, self.c))
        attended = scaled_dot_product_attention(self.norm(q), k, v).transpose(1, 2).flatten(2)
        return x + self.d(attended) + self.f(torch.relu(self.e(y)))


def test_attention_and_feed_forward_in_one_module():
    model = Flat(transformers.LlamaConfig(vocab_size=64, hidden_size=32))
    wanted = {f"{name}.{kind}" for name in "abcd" for kind in ("weight", "bias")} | {"norm.weight"}
    assert set(attention_parameters(model)) == wanted


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (build("qwen3"), (".self_attn.",)),  # with norms of queries and keys
        (build("phi"), (".self_attn.",)),  # with biases
        (transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)), (".attn.",)),
        (
            transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
            ),
            ("SelfAttention.", "EncDecAttention."),  # with the position biases
        ),
    ],
    ids=["qwen3", "phi", "gpt2", "t5"],
)
def test_attention_by_what_it_computes(model, parts):
    found = attention_parameters(model)
    assert found == [name for name, _ in model.named_parameters() if any(part in name for part in parts)]
    assert attention_parameters(model, trace(model)) == found


def test_nothing_changes_when_all_train_or_a_pattern_is_wrong():
    model = llama()
    model.lm_head.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    freeze_others(model, "all")
    with pytest.raises(ValueError, match=r"trainable='\*\.nothing' matches none"):
        freeze_others(model, ["*.k_proj.*", "*.nothing"])
    assert [parameter.requires_grad for parameter in model.parameters()] == before
