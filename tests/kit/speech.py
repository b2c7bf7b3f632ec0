"""Tones in WAV files with a word each, and a tiny Whisper with its feature extractor and a tokenizer of bytes."""

import wave
from pathlib import Path

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperTokenizer

WORDS = ["ant", "bee", "cat", "dog"]
RATE = 16000


def tone(number, rate=RATE, seconds=0.5):
    time = np.arange(int(rate * seconds)) / rate
    return (0.5 * np.sin(2 * np.pi * 200 * (number + 1) * time)).astype(np.float32)


def write_wav(path: Path, samples, rate=RATE, channels=1) -> str:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).round().astype("<i2").tobytes())
    return str(path)


def rows(count):
    """Examples as `datasets` takes them from arrays."""
    sound = [{"array": tone(number % 4), "sampling_rate": RATE} for number in range(count)]
    return {"audio": sound, "text": [WORDS[number % 4] for number in range(count)]}


def write_processor(folder: Path) -> str:
    tokenizer = WhisperTokenizer(vocab={sign: number for number, sign in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|startoftranscript|>", "<|notimestamps|>"]})
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    return str(folder)


def config(**options):
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 50}
    sizes |= {"max_target_positions": 32, "vocab_size": 300, "decoder_start_token_id": 257, "suppress_tokens": None}
    return WhisperConfig(**sizes, pad_token_id=256, bos_token_id=256, eos_token_id=256, begin_suppress_tokens=None, **options)
