import pytest
import torch
import transformers

import billhook
from billhook.checkpoints.verify import expect, logits_of, make_probe, verify
from kit.families import VIT, build, llama

TINY = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
UNUSUAL = {
    "images of another size": lambda: transformers.SiglipForImageClassification(
        transformers.SiglipConfig(text_config=TINY, vision_config=IMAGES)
    ),
    "images and text": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(text_config=TINY | {"max_position_embeddings": 40}, vision_config=IMAGES, projection_dim=8)
    ),
    "a waveform": lambda: transformers.Wav2Vec2ForCTC(
        transformers.Wav2Vec2Config(**TINY, conv_dim=(8, 8), conv_kernel=(4, 4), conv_stride=(2, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    ),
    "a cache of two kinds": lambda: transformers.JambaForCausalLM(
        transformers.JambaConfig(**TINY, num_key_value_heads=1, attn_layer_offset=1, attn_layer_period=2, num_experts=2,
        mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False)
    ),
    "codebooks": lambda: transformers.MusicgenForCausalLM(
        transformers.MusicgenDecoderConfig(vocab_size=50, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
        num_codebooks=4)
    ),
    "a text to read and codebooks to write": lambda: transformers.MusicgenForConditionalGeneration(
        transformers.MusicgenConfig(
            text_encoder=transformers.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2).to_dict(),
            audio_encoder=transformers.EncodecConfig(num_filters=4, hidden_size=8, codebook_size=64, upsampling_ratios=[2, 2],
            codebook_dim=8).to_dict(),
            decoder=transformers.MusicgenDecoderConfig(vocab_size=64, pad_token_id=60, bos_token_id=60, hidden_size=16,
            ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, num_codebooks=2).to_dict(),
        )
    ),
    "logits of three heads": lambda: transformers.MgpstrForSceneTextRecognition(
        transformers.MgpstrConfig(image_size=[8, 16], patch_size=4, max_token_length=3, num_character_labels=5, num_bpe_labels=6,
        num_wordpiece_labels=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2.0)
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("what", UNUSUAL)
def test_no_probe_is_needed_where_inputs_can_be_guessed(what, tmp_path):
    assert billhook.save(UNUSUAL[what]().eval(), tmp_path / "a").way == "plain"


def test_a_model_that_does_not_run_with_its_probe_is_refused_first(tmp_path):
    with pytest.raises(ValueError, match="probe: LlamaForCausalLM does not run with inputs, so it cannot"):
        billhook.save(llama(), tmp_path / "a", probe={"inputs": torch.ones(1, 2)})
    assert not (tmp_path / "a").exists()


def test_experts_are_computed_as_in_the_model(tmp_path):
    model = build("mixtral", intermediate_size=21)  # the default takes matrices of whole 16 bytes only
    model.set_experts_implementation("batched_mm")
    assert billhook.save(model, tmp_path / "a").difference == 0


def test_attention_is_computed_as_in_each_part(tmp_path):
    model = UNUSUAL["images and text"]()
    model.vision_model.config._attn_implementation = "eager"
    assert billhook.save(model, tmp_path / "a").difference == 0


def test_noise_that_a_model_draws_is_the_same_for_both(tmp_path):
    class Noisy(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            torch.rand(1, device="cpu")  # loading draws, too

        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.randn_like(output.logits)
            return output

    assert billhook.save(Noisy(llama().config), tmp_path / "a").difference == 0


def test_logits_of_another_size_are_others(tmp_path):
    model = llama()
    probe = make_probe(model)
    model.save_pretrained(tmp_path / "a")
    shapes = r"different logits: shape \[1, 32, 64\] instead of \[1, 31, 64\]"
    with pytest.raises(RuntimeError, match=f"the model was not saved, because the reloaded checkpoint has {shapes}"):
        verify(model, expect(model, probe)[:, 1:], tmp_path / "a", probe)


def test_where_the_weights_lie_in_memory_does_not_matter(tmp_path):
    model = transformers.FocalNetForImageClassification(transformers.FocalNetConfig(embed_dim=24, depths=[1, 1], image_size=32))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # which rounding grows with
    for place in (0, 1):
        for parameter in model.parameters():
            room = torch.empty(parameter.numel() + place)
            parameter.data = room[place:].view(parameter.shape).copy_(parameter.data)
        assert billhook.save(model.eval(), tmp_path / str(place)).difference == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_last_digit_of_every_weight_is_rounding_and_more_is_not(dtype, tmp_path):
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)).to(dtype).eval()
    probe = make_probe(model)
    expected = expect(model, probe)
    model.save_pretrained(tmp_path / "a")
    assert verify(model, expected, tmp_path / "a", probe) == 0

    def changed(digits: int) -> torch.Tensor:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + digits * torch.finfo(dtype).eps * torch.randn_like(parameter).sign())
        return logits_of(model, probe)

    assert 0 < verify(model, changed(1), tmp_path / "a", probe) < 0.05
    with pytest.raises(RuntimeError, match="the model was not saved, because the logits of the reloaded checkpoint differ by"):
        verify(model, changed(100), tmp_path / "a", probe)
