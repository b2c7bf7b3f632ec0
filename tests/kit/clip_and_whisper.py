"""A tiny CLIP and a tiny Whisper in which every weight matters, and a batch of each."""

import torch
from torch.nn.init import normal_
from transformers import CLIPConfig, CLIPModel, WhisperConfig, WhisperForConditionalGeneration

TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "projection_dim": 8}
TEXT = TOWER | {"vocab_size": 32, "max_position_embeddings": 12, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
END, START = 30, 31


def clip():
    torch.manual_seed(0)
    images = TOWER | {"image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=images, projection_dim=8))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            normal_(parameter, std=0.3)
    return model


def whisper():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 50}
    sizes |= {"max_target_positions": 16, "vocab_size": 32, "suppress_tokens": None, "begin_suppress_tokens": None}
    ends = {"pad_token_id": END, "bos_token_id": END, "eos_token_id": END, "decoder_start_token_id": START}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, **ends, init_std=0.3))


def clip_batch(seed=0, examples=6):
    """Images and words that end in CLIP's end of text, with its loss asked for."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 32, (examples, 8), generator=draw)
    words[:, -1] = TEXT["eos_token_id"]
    pixels = torch.randn(examples, 3, 16, 16, generator=draw)
    return {"pixel_values": pixels, "input_ids": words, "attention_mask": torch.ones_like(words), "return_loss": True}


def whisper_batch(seed=0, examples=4):
    """A second of sound as Whisper's features, and words of other lengths."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, END, (examples, 6), generator=draw)
    labels[:, -2] = END
    labels[:, -1] = -100
    return {"input_features": torch.randn(examples, 8, 100, generator=draw), "labels": labels}
