"""Checks that an engine computes a folder as transformers does: converted, run there, and compared."""

import math
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from gguf import GGUFReader
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedModel

from billhook.arguments import check_int, check_one_of, check_types
from billhook.assets import model_path
from billhook.calibration.generated import check_can_generate, generated
from billhook.engine.state import evaluating_without_grad, overridden
from billhook.model.config_fields import text_config
from billhook.model.meta import check_checkpoint, model_class, read_config
from billhook.model.preprocessors import load_tokenizer
from billhook.model.shaped import load_as, readable
from billhook.serving.converter import Converter
from billhook.serving.engine import LlamaCpp
from billhook.serving.worker import WorkerError
from billhook.serving.written import Written, write_gguf

EngineName = Literal["llama.cpp"]
Quantised = Literal["Q8_0", "Q4_K_M"]
KINDS: tuple[Quantised, ...] = get_args(Quantised)
TOLERANCE = 1e-3
"""The difference of logits that counts as rounding, as a share of the largest."""
PATTERNS = {"gemma2": 2, "gemma3_text": 6}
"""Of every so many layers, the last looks back without limit: what llama.cpp knows of a family, whatever its config says."""
TEXT = "The farmer's hedge-laying tool was, in 1883, a billhook;  it cost £2.\n\n\tNaïve? He'd say I'm 12345 times so."
"""What is split into tokens on both sides: case, digits, spaces in a row, an apostrophe, letters beyond ASCII."""


@dataclass(frozen=True)
class Lossy:
    """The cost of quantisation.

    Attributes:
        kind: `"Q8_0"` or `"Q4_K_M"`.
        perplexity: How many times the perplexity of transformers' float32 it has, on tokens that the model wrote.
        bits: Bits for each weight of the file.
        failed: Why the engine does not quantise or run it; empty if it does.
    """

    kind: str
    perplexity: float = math.nan
    bits: float = math.nan
    failed: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.failed or f'perplexity times {self.perplexity:.4f}, {self.bits:.2f} bits a weight'}"


@dataclass(frozen=True)
class Served:
    """The verdict of an engine on a folder; `print` shows it in lines.

    Attributes:
        folder: The folder.
        engine: The engine's name.
        yes: Whether it loads the folder, reads text as the same tokens, and computes the same.
        why: What shows it, or what is in the way.
        difference: The largest difference of logits in F32, as a share of the largest logit; None where none were computed.
        alike: How many of the greedy tokens are the same before the first that differs, and how many there were.
        quantised: The cost of quantisation.
    """

    folder: str
    engine: str
    yes: bool
    why: str
    difference: float | None = None
    alike: tuple[int, int] | None = None
    quantised: tuple[Lossy, ...] = field(default=())

    def __str__(self) -> str:
        return "\n".join([f"{self.engine}: {'yes' if self.yes else 'no'}: {self.why}", *(f"  {cost}" for cost in self.quantised)])


def serve_check(
    folder: str | Path,
    engine: EngineName | LlamaCpp = "llama.cpp",
    converter: Converter | str | Path | None = None,
    tokens: int = 128,
    new_tokens: int = 24,
    quantised: Sequence[Quantised] = KINDS,
    threads: int = 1,
) -> Served:
    """Converts a folder for an engine, runs it there, and compares logits and greedy tokens with transformers, in float32.

    The tokens are some that the model wrote itself. Quantised, its perplexity on them is compared.

    Args:
        folder: A Hugging Face checkpoint, or `"tiny"`.
        engine: `"llama.cpp"`, or one that runs already, which keeps its own threads.
        converter: llama.cpp's converter, or where its `convert_hf_to_gguf.py` is; by default the one that is installed.
        tokens: Tokens of the row that is compared; fewer if the model reads no more.
        new_tokens: Greedy tokens after it.
        quantised: The kinds of quantisation that are tried.
        threads: Threads of the engine.

    Returns:
        Yes or no, and why.

    Raises:
        ValueError: If an argument is not legal, or `folder` is not a checkpoint of a model that writes text.
        Missing: If the engine or the converter is not installed; its message says what to install.
    """
    arguments = locals()
    folder = model_path(str(folder))
    check_types(serve_check, arguments)
    if not Path(folder).is_dir():
        raise ValueError(f"folder={folder!r} must be a folder on this machine")
    if isinstance(engine, str):
        check_one_of("engine", engine, EngineName)
    check_int("tokens", tokens, 2)
    check_int("new_tokens", new_tokens)
    check_int("threads", threads)
    for kind in quantised:
        check_one_of("quantised", kind, Quantised)
    if not isinstance(converter, Converter):
        with Converter(converter) as installed:
            return serve_check(folder, engine, installed, tokens, new_tokens, quantised, threads)
    model = _reference(folder)
    config: Any = text_config(model.config)
    wanted = tokens + new_tokens
    length = min(wanted, getattr(config, "max_position_embeddings", None) or wanted) - new_tokens
    if length < 2:
        raise ValueError(f"new_tokens={new_tokens}: {type(model).__name__} reads too few tokens at once")
    with (
        tempfile.TemporaryDirectory() as near,
        LlamaCpp(threads) if isinstance(engine, str) else nullcontext(engine) as running,
    ):
        file = Path(near, "f32.gguf")
        try:
            written = write_gguf(folder, file, converter, ids_alone=True)
        except WorkerError as error:
            return Served(folder, running.name, False, f"it cannot be converted: {error}")
        try:
            return _compared(folder, model, written, running, file, length, new_tokens, quantised)
        except WorkerError as error:
            return Served(folder, running.name, False, f"{running.name} does not run it: {error}")


def _reference(folder: str) -> PreTrainedModel:
    """Loads a folder in float32; refuses one that is no checkpoint, or whose model writes no text."""
    check_checkpoint(folder)
    kind = model_class(read_config(folder), folder)
    with readable(folder):
        model = load_as(kind, folder, torch.float32)
    check_can_generate(model)
    if model.config._attn_implementation != "eager":
        model.set_attn_implementation("eager")  # as the class has it written down: faster ones leave out soft caps
    return model


def _compared(
    folder: str,
    model: PreTrainedModel,
    written: Written,
    engine: LlamaCpp,
    file: Path,
    length: int,
    new_tokens: int,
    quantised: Sequence[Quantised],
) -> Served:
    """Runs a file in the engine, and compares it with the model that it was made of."""
    row = _row(model, length)
    with evaluating_without_grad(model):
        expected = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float()
    following = _greedy(model, row, new_tokens)
    engine.load(file, length + new_tokens)
    logits, (greedy, _, _) = engine.logits(row), engine.greedy(row, new_tokens)
    if logits.shape != expected.shape:
        why = f"it computes logits of {list(logits.shape)}, and transformers of {list(expected.shape)}"
        return Served(folder, engine.name, False, why)
    apart, largest = (logits - expected).abs().amax(1), expected.abs().max()
    difference = float(apart.max() / largest)
    alike = next((i for i, (a, b) in enumerate(zip(greedy, following, strict=True)) if a != b), new_tokens)
    reasons = list[str]()
    if difference > TOLERANCE:
        first = int((apart > TOLERANCE * largest).int().argmax()) + 1
        where = f"from token {first} of {len(row)} on"
        reasons.append(f"logits differ by {difference:.1e} of the largest, more than {TOLERANCE:g}, {where}")
    if alike < new_tokens:
        reasons.append(f"of {new_tokens} greedy tokens, {alike} are the same before the first that differs")
    reasons += [written.vocabulary] if written.vocabulary else _other_tokens(folder, engine)
    same = f"{alike} of {new_tokens} greedy tokens are the same{_limit(model, file)}"
    proof = f"{written}; logits differ by {difference:.1e} of the largest, {same}"
    why = f"{'; '.join(reasons)} ({proof})" if reasons else proof
    costs = tuple(_lossy(engine, file, kind, row, expected) for kind in quantised)
    return Served(folder, engine.name, not reasons, why, difference, (alike, new_tokens), costs)


def _row(model: PreTrainedModel, length: int) -> list[int]:
    """Returns tokens that the model wrote itself, drawn from its own distribution, or random ones if none begins a text."""
    try:
        ids: Tensor = generated(model, examples=1, length=length)[0]["input_ids"][0]
    except ValueError:
        embeddings: Any = model.get_input_embeddings()
        ids = torch.randint(len(embeddings.weight), (length,), generator=torch.Generator().manual_seed(0))
    return [int(token) for token in ids]


def _greedy(model: PreTrainedModel, tokens: Sequence[int], count: int) -> list[int]:
    """Returns the `count` tokens that follow a row by always taking the most likely one, past the ends of texts."""
    how = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0, use_cache=True
    )  # fmt: skip
    ids, write = torch.tensor([list(tokens)]), cast(Any, model.generate)
    with evaluating_without_grad(model), overridden(model, generation_config=how):  # which would add what `how` leaves open
        written: list[int] = write(ids, attention_mask=torch.ones_like(ids), generation_config=how)[0, len(tokens) :].tolist()
    return written


def _limit(model: PreTrainedModel, file: Path) -> str:
    """Says up to how many tokens that holds, where the engine's attention looks back otherwise than the model's."""
    config: Any = text_config(model.config)
    window, types = getattr(config, "sliding_window", None), list(getattr(config, "layer_types", None) or ["sliding_attention"])
    if not window or window >= (getattr(config, "max_position_embeddings", None) or math.inf) or "sliding_attention" not in types:
        return ""
    fields: Any = GGUFReader(file).fields
    family = fields["general.architecture"].contents()
    limit = fields.get(f"{family}.attention.sliding_window")
    if limit is not None and family != "phi3" and int(limit.contents()) == window:  # llama.cpp reads no limit of Phi-3's
        every = PATTERNS.get(config.model_type)
        if every and all((kind == "full_attention") == (number % every == 0) for number, kind in enumerate(types, 1)):
            return ""
    return f"; up to {window:,} tokens: beyond, layers of the engine look back otherwise"


def _other_tokens(folder: str, engine: LlamaCpp) -> list[str]:
    """Says where a text becomes other tokens."""
    expected: list[int] = load_tokenizer(folder)(TEXT, add_special_tokens=False)["input_ids"]
    tokens = engine.tokenize(TEXT)
    if tokens == expected:
        return []
    same = next((i for i, (a, b) in enumerate(zip(tokens or [], expected, strict=False)) if a != b), 0)
    return [f"it reads text as other tokens: {tokens} where transformers reads {expected}, from the {same + 1}th on"]


def _lossy(engine: LlamaCpp, file: Path, kind: Quantised, row: Sequence[int], expected: Tensor) -> Lossy:
    """Quantises a file, and measures what that costs."""
    out, following = file.with_name(f"{kind}.gguf"), torch.tensor(row[1:])
    try:
        engine.quantise(file, out, kind)
        engine.load(out, len(row))
        losses = [cross_entropy(logits[:-1].double(), following) for logits in (engine.logits(row), expected)]
    except WorkerError as error:
        return Lossy(kind, failed=f"no: {error}")
    tensors = GGUFReader(out).tensors
    bits = 8 * sum(int(tensor.n_bytes) for tensor in tensors) / sum(int(tensor.n_elements) for tensor in tensors)
    out.unlink()
    return Lossy(kind, math.exp(float(losses[0]) - float(losses[1])), bits)
