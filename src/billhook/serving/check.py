"""Runs a checkpoint in an inference engine and compares its outputs with transformers."""

import math
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedModel

from billhook.arguments import check_int, check_one_of, check_types
from billhook.assets import model_path
from billhook.calibration.generated import check_can_generate, generated
from billhook.engine import evaluating_without_grad, overridden
from billhook.model import check_checkpoint, load_as, load_tokenizer, model_class, read_config, readable, text_config
from billhook.serving.converter import Converter
from billhook.serving.engine import LlamaCpp
from billhook.serving.worker import WorkerError
from billhook.serving.written import Written, write_gguf

EngineName = Literal["llama.cpp"]
Quantized = Literal["Q8_0", "Q4_K_M"]
KINDS: tuple[Quantized, ...] = get_args(Quantized)
TOLERANCE = 1e-3
"""Largest difference of logits that counts as rounding, relative to the largest logit."""
PATTERNS = {"gemma2": 2, "gemma3_text": 6, "gpt_oss": 2}
"""Period of full-attention layers that llama.cpp assumes for a family, whatever the config says."""
TEXT = "The farmer's hedge-laying tool was, in 1883, a billhook;  it cost £2.\n\n\tNaïve? He'd say I'm 12345 times so."
"""Text for comparing tokenizers: case, digits, repeated spaces, an apostrophe, and letters beyond ASCII."""


@dataclass(frozen=True)
class QuantizedFile:
    """Size and perplexity of a quantized file.

    Attributes:
        kind: `"Q8_0"` or `"Q4_K_M"`.
        perplexity: Perplexity relative to transformers in float32, on self-generated tokens.
        bits: Bits per weight of the file.
        failed: Reason why the engine cannot quantize or run it. Empty if it can.
    """

    kind: str
    perplexity: float = math.nan
    bits: float = math.nan
    failed: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.failed or f'perplexity {self.perplexity:.4f}x, {self.bits:.2f} bits per weight'}"


@dataclass(frozen=True)
class ServeResult:
    """Result of running a checkpoint in an engine. `print` shows it in lines.

    Attributes:
        folder: Checkpoint folder.
        engine: Name of the engine.
        supported: True if the engine loads the folder, tokenizes text equally, and computes the same logits.
        reason: Measurements, or the reason why it is not supported.
        difference: Largest difference of logits in F32, relative to the largest logit. None if none were computed.
        matching_tokens: Number of equal greedy tokens before the first difference, and number of tokens.
        quantized: Size and perplexity of the quantized files.
    """

    folder: str
    engine: str
    supported: bool
    reason: str
    difference: float | None = None
    matching_tokens: tuple[int, int] | None = None
    quantized: tuple[QuantizedFile, ...] = field(default=())

    def __str__(self) -> str:
        verdict = "supported" if self.supported else "not supported"
        return "\n".join([f"{self.engine}: {verdict}: {self.reason}", *(f"  {result}" for result in self.quantized)])


def serve_check(
    folder: str | Path,
    engine: EngineName | LlamaCpp = "llama.cpp",
    converter: Converter | str | Path | None = None,
    tokens: int = 128,
    new_tokens: int = 24,
    quantized: Sequence[Quantized] = KINDS,
    threads: int = 1,
) -> ServeResult:
    """Runs a checkpoint in an engine and compares logits and greedy tokens with transformers.

    The comparison is in float32, on self-generated tokens. Quantized files are compared by their perplexity on them.

    Args:
        folder: Hugging Face checkpoint, or `"tiny"`.
        engine: `"llama.cpp"`, or a running engine, which keeps its own number of threads.
        converter: llama.cpp's converter, or the path of its `convert_hf_to_gguf.py`. Defaults to the installed one.
        tokens: Number of tokens to compare, at most the model's maximum length.
        new_tokens: Number of greedy tokens to compare after them.
        quantized: Quantization kinds to measure.
        threads: Number of threads of the engine.

    Returns:
        Verdict, with the reason.

    Raises:
        ValueError: If an argument is not legal, or `folder` is not a checkpoint of a generative text model.
        Missing: If the engine or the converter is not installed. The message names the package.
    """
    arguments = locals()
    folder = model_path(str(folder))
    check_types(serve_check, arguments)
    if not Path(folder).is_dir():
        raise ValueError(f"folder={folder!r} must be a local folder")
    check_int("tokens", tokens, 2)
    check_int("new_tokens", new_tokens)
    check_int("threads", threads)
    for kind in quantized:
        check_one_of("quantized", kind, Quantized)
    if not isinstance(converter, Converter):
        with Converter(converter) as installed:
            return serve_check(folder, engine, installed, tokens, new_tokens, quantized, threads)
    check_checkpoint(folder)
    kind_of_model = model_class(read_config(folder), folder)
    with readable(folder):
        model = load_as(kind_of_model, folder, torch.float32)
    check_can_generate(model)
    if model.config._attn_implementation != "eager":
        model.set_attn_implementation("eager")  # the reference implementation: faster ones leave out soft caps
    config = text_config(model.config)
    wanted = tokens + new_tokens
    length = min(wanted, getattr(config, "max_position_embeddings", None) or wanted) - new_tokens
    if length < 2:
        raise ValueError(
            f"new_tokens={new_tokens} leaves fewer than 2 tokens of the maximum length of {type(model).__name__}. Use fewer."
        )
    with tempfile.TemporaryDirectory() as near, LlamaCpp(threads) if isinstance(engine, str) else nullcontext(engine) as running:
        file = Path(near, "f32.gguf")
        try:
            written = write_gguf(folder, file, converter, ids_only=True)
        except WorkerError as error:
            return ServeResult(folder, running.name, False, f"conversion failed: {error}")
        try:
            return _compared(folder, model, written, running, file, length, new_tokens, quantized)
        except WorkerError as error:
            return ServeResult(folder, running.name, False, f"{running.name} cannot run it: {error}")


def _compared(
    folder: str,
    model: PreTrainedModel,
    written: Written,
    engine: LlamaCpp,
    file: Path,
    length: int,
    new_tokens: int,
    quantized: Sequence[Quantized],
) -> ServeResult:
    """Runs a file in the engine and compares its outputs with the model's."""
    try:
        row = generated(model, examples=1, length=length)[0]["input_ids"][0].tolist()
    except ValueError:  # the model has no first token
        embeddings: Any = model.get_input_embeddings()
        row = torch.randint(len(embeddings.weight), (length,), generator=torch.Generator().manual_seed(0)).tolist()
    with evaluating_without_grad(model):
        expected = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float()
    following = _greedy(model, row, new_tokens)
    engine.load(file, length + new_tokens)
    logits = engine.logits(row)
    greedy, _, _ = engine.greedy(row, new_tokens)
    if logits.shape != expected.shape:
        reason = f"logits have shape {list(logits.shape)}, in transformers {list(expected.shape)}"
        return ServeResult(folder, engine.name, False, reason)
    differences = (logits - expected).abs().amax(1)
    largest = expected.abs().max()
    difference = float(differences.max() / largest)
    matching = len(commonprefix([greedy, following]))
    reasons = []
    if difference > TOLERANCE:
        first = int((differences > TOLERANCE * largest).int().argmax()) + 1
        reasons.append(f"logits differ by {difference:.1e} of the largest (limit {TOLERANCE:g}) from token {first} of {len(row)}")
    if matching < new_tokens:
        reasons.append(f"greedy tokens differ after {matching} of {new_tokens}")
    if written.vocabulary:
        reasons.append(written.vocabulary)
    else:
        ours = load_tokenizer(folder)(TEXT, add_special_tokens=False)["input_ids"]
        if (theirs := engine.tokenize(TEXT)) != ours:
            same = next((i for i, (a, b) in enumerate(zip(theirs or [], ours, strict=False)) if a != b), 0)
            reasons.append(f"tokenization differs from token {same + 1}: {theirs} instead of {ours}")
    equal = f"{matching} of {new_tokens} greedy tokens match{_limit(model, file)}"
    measured = f"{written}; logits differ by {difference:.1e} of the largest, {equal}"
    reason = f"{'; '.join(reasons)} ({measured})" if reasons else measured
    results = tuple(_quantized(engine, file, kind, row, expected) for kind in quantized)
    return ServeResult(folder, engine.name, not reasons, reason, difference, (matching, new_tokens), results)


def _greedy(model: PreTrainedModel, tokens: Sequence[int], count: int) -> list[int]:
    """Returns `count` greedy tokens after a row, past end-of-text tokens."""
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0, use_cache=True
    )  # fmt: skip
    ids = torch.tensor([list(tokens)])
    generate = cast(Any, model.generate)
    with evaluating_without_grad(model), overridden(model, generation_config=generation):  # its own would fill in unset fields
        rows = generate(ids, attention_mask=torch.ones_like(ids), generation_config=generation)
    following: list[int] = rows[0, len(tokens) :].tolist()
    return following


def _limit(model: PreTrainedModel, file: Path) -> str:
    """Returns the length limit if the engine's attention window differs from the model's."""
    config = text_config(model.config)
    window = getattr(config, "sliding_window", None)
    types = list(getattr(config, "layer_types", None) or ["sliding_attention"])
    if not window or window >= (getattr(config, "max_position_embeddings", None) or math.inf) or "sliding_attention" not in types:
        return ""
    from gguf import GGUFReader  # of an extra, which the converter needs

    fields = GGUFReader(file).fields
    family = fields["general.architecture"].contents()
    limit = fields.get(f"{family}.attention.sliding_window")
    if limit is not None and family != "phi3" and int(limit.contents()) == window:  # llama.cpp reads no limit of Phi-3's
        every = PATTERNS.get(config.model_type)
        if every and all((kind == "full_attention") == (number % every == 0) for number, kind in enumerate(types, 1)):
            return ""
    return f"; valid up to {window:,} tokens, because the engine uses other attention windows"


def _quantized(engine: LlamaCpp, file: Path, kind: Quantized, row: Sequence[int], expected: Tensor) -> QuantizedFile:
    from gguf import GGUFReader

    out = file.with_name(f"{kind}.gguf")
    following = torch.tensor(row[1:])
    try:
        engine.quantize(file, out, kind)
        engine.load(out, len(row))
        loss = cross_entropy(engine.logits(row)[:-1].double(), following)
    except WorkerError as error:
        return QuantizedFile(kind, failed=f"failed: {error}")
    tensors = GGUFReader(out).tensors
    bits = 8 * sum(int(tensor.n_bytes) for tensor in tensors) / sum(int(tensor.n_elements) for tensor in tensors)
    out.unlink()
    return QuantizedFile(kind, math.exp(float(loss - cross_entropy(expected[:-1].double(), following))), bits)
