"""Families of models that the oracle permutes."""

FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo", "olmo2", "cohere", "glm4",
    "stablelm", "starcoder2", "smollm3", "granite", "nemotron", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "opt",
    "bloom", "mpt", "falcon", "codegen", "biogpt", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3", "dbrx",
    "mamba", "mamba2", "falcon_h1", "recurrent_gemma", "bert", "roberta", "electra", "albert", "distilbert", "deberta-v2",
    "modernbert", "mpnet", "t5", "mt5", "bart", "pegasus", "marian", "whisper", "vit", "deit", "dinov2", "swin", "convnext",
    "resnet", "wav2vec2", "hubert",
]  # fmt: skip
