"""Small fast tokenizers of every kind, trained on a few lines of many scripts."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "the quick brown fox jumps over the lazy dog, and then the dog sleeps for the rest of the day",
    "def main(argument: int) -> None:\n    return argument + 12345  # the sum",
    "les élèves étudient l'été; die Schüler lernen im Sommer über Größe",
    "быстрая лиса прыгает через ленивую собаку и бежит дальше",
    "quick quick brown brown foxes foxes jumping jumped lazily lazier doggedly",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
TEXTS = [
    *LINES,
    "naïve café, 日本語のテキスト 🙂👩‍👩‍👧 x=1;\n\tfoo(bar) # TODO",
    "العربية עברית हिन्दी ไทย 한국어 中文 ελληνικά ქართული",
    "\u0000\u200d\ufeff mixed   spaces \r\n tabs\t\tend ",
]
"""Texts, also of scripts that no tokenizer was trained on."""


def wrapped(tokenizer: Tokenizer, **options: object) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>", **options
    )


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""The expression by which Llama 3's tokenizer splits text; Qwen2's splits digits one by one."""


def splitting(name: str) -> pre_tokenizers.PreTokenizer:
    """How a tokenizer splits text before it merges bytes."""
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), splitting("gpt-2")])
    expression = Regex(LLAMA3 if name == "llama-bpe" else LLAMA3.replace("{1,3}", ""))
    split = pre_tokenizers.Split(expression, behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(size: int = 400, special_last: bool = False, split: str = "gpt-2") -> PreTrainedTokenizerFast:
    """Byte-pair encoding of bytes, as GPT-2's and SmolLM2's; with special tokens at the end, as Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitting(split)
    tokenizer.decoder = decoders.ByteLevel()
    special = [] if special_last else SPECIAL
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    ids = [("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return wrapped(tokenizer, chat_template=CHAT)


def metaspace(size: int = 400) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of characters, with bytes for those that it lacks, as Llama 2's and Gemma's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=256 + size, special_tokens=SPECIAL, show_progress=False))
    spec = json.loads(tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    for token in special[len(SPECIAL) :]:
        vocab[token] = len(vocab)
    return wrapped(Tokenizer.from_str(json.dumps(spec)))


def unigram(size: int = 200) -> PreTrainedTokenizerFast:
    """A unigram model, as T5's and XLM-R's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        LINES, trainers.UnigramTrainer(vocab_size=size, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    )
    return wrapped(tokenizer)


def wordpiece(size: int = 250) -> PreTrainedTokenizerFast:
    """WordPiece, as BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False))
    tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    return wrapped(tokenizer)


def word_level() -> PreTrainedTokenizerFast:
    """Whole words alone."""
    return wrapped(Tokenizer(models.WordLevel({token: number for number, token in enumerate([*SPECIAL, "the"])}, "<unk>")))


def like_llama3() -> PreTrainedTokenizerFast:
    """Bytes, whole words taken at once, and tokens that several merges make."""
    spec = json.loads(byte_level(420).backend_tokenizer.to_str())
    vocab, merges = spec["model"]["vocab"], [tuple(merge) for merge in spec["model"]["merges"]]
    every = [(token[:cut], token[cut:]) for token in vocab for cut in range(1, len(token))]
    more = [merge for merge in every if {*merge} <= vocab.keys() and merge not in merges]
    spec["model"] |= {"merges": sorted({*merges, *more}, key=lambda merge: vocab["".join(merge)]), "ignore_merges": True}
    return wrapped(Tokenizer.from_str(json.dumps(spec)))


KINDS = {
    "byte-level": byte_level,
    "byte-level, special tokens last": lambda: byte_level(special_last=True),
    "as Llama 3": like_llama3,
    "metaspace": metaspace,
    "unigram": unigram,
    "WordPiece": wordpiece,
}
IN_BYTES = [kind for kind in KINDS if kind not in ("unigram", "WordPiece")]
