"""Distillation: a model in training also learns from the outputs of another one, the teacher, on the same batch."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel
from typing_extensions import Self

from billhook.arguments import check_fraction, check_number, check_path, check_types
from billhook.model.config_fields import text_config

CHUNK = 2**22
"""How many logits are in work at once: 16 MB in float32."""


@dataclass(frozen=True)
class Distillation:
    """Learning from a teacher: (1 - weight) CE + weight T^2 KL(p || q) + hidden MSE.

    Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network (2015), https://arxiv.org/abs/1503.02531.

    p = softmax(teacher's logits / T) and q = softmax(student's logits / T); KL is the mean over all tokens whose label
    is not -100, each with the logits that predict it (over examples, for classification). CE is the model's own loss on the
    labels. MSE is between the hidden states after blocks, except at padding; if the student has fewer blocks, its block i of n is
    compared with the teacher's block round(i N / n) of N.

    It costs a forward pass of the teacher in each step, and in memory its weights (no gradients, no optimizer state), the logits
    of the batch once in the forward pass and once more in the backward pass. With SmolLM2-135M in float32 on a CPU, a step on
    2 x 128 tokens takes 1.33 times the time of full training without a teacher (LoRA alone 0.80, LoRA with a teacher 1.26), and
    memory peaks at 3.9 instead of 3.5 GiB (LoRA: 2.4 instead of 1.8).

    Args:
        teacher: The model to learn from, a name or folder like the student's, with the same vocabulary. By default a frozen copy
            of the student as it is when the module is made, before any callback cuts it.
        temperature: T, above 0; both distributions are softer above 1.
        weight: Share of the teacher in the loss on logits, in [0, 1]; with 0 only the labels count.
        hidden: Weight of the MSE between hidden states, at least 0; 0 leaves it out. Both must be equally wide. The MSE has the
            scale of the model's own states, which may be large in a few places: begin small.

    Raises:
        ValueError: If a number is out of range, or the teacher is no name.

    Example:
        >>> import billhook as bh
        >>> module = bh.TransformerModule("tiny", distillation=bh.training.Distillation(temperature=3.0, weight=0.9))
        >>> bh.training.Distillation(weight=2.0)
        Traceback (most recent call last):
        ValueError: weight=2.0 must be in [0, 1]; did you mean 0.02?
    """

    teacher: str | None = None
    temperature: float = 2.0
    weight: float = 0.5
    hidden: float = 0.0

    def __post_init__(self) -> None:
        if self.teacher is not None:
            check_path("teacher", self.teacher)
        check_number("temperature", self.temperature, above=0)
        check_fraction("weight", self.weight, "[0, 1]")
        check_number("hidden", self.hidden, 0)
        check_types(Distillation, vars(self))
        if self.weight == self.hidden == 0:
            raise ValueError("weight=0 and hidden=0 leave nothing to learn from a teacher: leave distillation out")


class Teacher:
    """A frozen model to learn from. It is not part of any module: it is neither trained, saved nor found in one.

    Copies of the module that has it, deep ones too, share it.
    """

    def __init__(self, model: PreTrainedModel, settings: Distillation, causal: bool) -> None:
        self.model = model.requires_grad_(False).train(False)
        self.settings, self.causal = settings, causal
        self.fingerprint = fingerprint(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @property
    def asks(self) -> dict[str, bool]:
        """Arguments of student and teacher in addition to the batch."""
        return {"output_hidden_states": True} if self.settings.hidden else {}

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - a ModelOutput
        """Returns the loss on a batch with `labels`, and the KL in it, in nats per token; `output` has the student's own loss."""
        taught = self._output(batch)
        counted = counted_in(batch["labels"], output.logits, self.causal)
        divergence = kl_divergence(output.logits, taught.logits, counted, self.settings.temperature)
        weight, squared = self.settings.weight, self.settings.temperature**2
        loss = (1 - weight) * output.loss + weight * squared * divergence
        if self.settings.hidden:
            loss = loss + self.settings.hidden * hidden_error(output, taught, batch)
        return loss, divergence.detach()

    def follow(self, student: PreTrainedModel) -> None:
        """Moves the teacher to the student's device and dtype."""
        if (self.model.device, self.model.dtype) != (student.device, student.dtype):
            self.model.to(student.device, student.dtype)

    @torch.no_grad()
    def _output(self, batch: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if self.model.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
            shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
            made = {"labels": batch["labels"]} if shift is None else {"decoder_input_ids": shift(labels=batch["labels"])}
            inputs |= made  # without the first, some models make none
        return self.model(**inputs, **self.asks)


def counted_in(labels: Tensor, logits: Tensor, causal: bool) -> Tensor:
    """Marks the logits that count, all except those of the label -100: bool, `[*, tokens]` or `[examples]`."""
    if logits.ndim == 2:
        return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    return (pad(labels[:, 1:], (0, 1), value=-100) if causal else labels) != -100


def kl_divergence(student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
    """Computes the mean of KL(softmax(teacher / T) || softmax(student / T)) over counted logits, in float32 or better.

    Logits are `[..., classes]`, and `counted` is bool, `[...]`. The gradient is computed with the value and kept in memory of the
    teacher's logits, which are overwritten: the forward pass makes no other tensor of that size, the backward pass only the
    gradient itself. Apart from them, at most 4 million logits are in use at once.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"distillation: the logits of student {list(student.shape)} and teacher {list(teacher.shape)} must have one shape"
        )
    rows = counted.flatten().nonzero().squeeze(1)
    divergence: Tensor = _Divergence.apply(student.flatten(0, -2), teacher.flatten(0, -2), rows, temperature)  # type: ignore[no-untyped-call]
    return divergence


class _Divergence(torch.autograd.Function):
    """The mean over rows of KL, and dKL / dstudent = (q - p) / (T rows)."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, rows: Tensor, temperature: float) -> Tensor:  # noqa: ANN401
        dtype = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=student.device)
        for chunk in _chunks(rows, student):
            log_p, log_q = (torch.log_softmax(logits[chunk].to(dtype) / temperature, -1) for logits in (teacher, student))
            p = log_p.exp()
            total += torch.where(p > 0, p * (log_p - log_q), 0).sum()
            teacher[chunk] = (log_q.exp() - p).to(teacher.dtype)
        ctx.save_for_backward(teacher, rows)
        ctx.temperature, ctx.dtype = temperature, student.dtype
        return total / max(1, len(rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        slopes, rows = ctx.saved_tensors
        gradient = torch.zeros_like(slopes, dtype=ctx.dtype)
        scale = upstream / (ctx.temperature * max(1, len(rows)))
        for chunk in _chunks(rows, slopes):
            # scaled before it is rounded to half: loss scaling comes from upstream
            gradient[chunk] = (slopes[chunk].to(upstream.dtype) * scale).to(ctx.dtype)
        return gradient, None, None, None


def _chunks(rows: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    return torch.split(rows, max(1, CHUNK // max(1, logits.shape[-1])))


def hidden_error(student: Any, teacher: Any, batch: Mapping[str, Tensor]) -> Tensor:  # noqa: ANN401
    """Computes the mean squared error between hidden states after blocks, except at padding, over the student's blocks."""
    mask = batch.get("attention_mask")
    kept = {"hidden_states": mask, "encoder_hidden_states": mask, "decoder_hidden_states": batch["labels"] != -100}
    errors = []
    for name, keep in kept.items():
        ours, theirs = (list(getattr(output, name, None) or ())[1:] for output in (student, teacher))  # without the embeddings
        for block, state in enumerate(ours, start=1):
            errors.append(_squared_error(state, theirs[round(block * len(theirs) / len(ours)) - 1], keep))
    if not errors:
        raise ValueError("distillation: hidden must be 0 for a model that gives no hidden states")
    return torch.stack(errors).mean()


def _squared_error(ours: Tensor, theirs: Tensor, keep: Tensor | None) -> Tensor:
    if ours.shape != theirs.shape:
        raise ValueError(
            f"distillation: hidden states of the student {list(ours.shape)} and the teacher {list(theirs.shape)} must have one "
            "shape: use hidden=0 where the hidden size is pruned"
        )
    difference = ours.to(torch.promote_types(ours.dtype, torch.float32)) - theirs
    return (difference if keep is None or keep.shape != ours.shape[:-1] else difference[keep.bool()]).square().mean()


def check_teacher(student: PreTrainedModel, teacher: PreTrainedModel, settings: Distillation, classifies: bool) -> None:
    """Refuses a teacher whose logits or inputs mean something else than the student's."""
    student_config, teacher_config = text_config(student.config), text_config(teacher.config)
    name = f"distillation: teacher={settings.teacher!r}"
    fields = ["num_labels"] * classifies + ["vocab_size"] + ["hidden_size"] * bool(settings.hidden)
    for field in fields:
        ours, theirs = (getattr(config, field, None) for config in (student_config, teacher_config))
        if ours != theirs:
            raise ValueError(f"{name} has {field}={theirs}, the student {ours}: they must be the same")
    ours, theirs = (_vocabulary(model.config) for model in (student, teacher))
    if ours and theirs and ours != theirs:
        raise ValueError(f"{name} has a tokenizer that gives other tokens other numbers than the student's: it must be the same")


def _vocabulary(config: PretrainedConfig) -> dict[str, int] | None:
    """Returns token ids by token, if the model was saved with a tokenizer."""
    try:
        vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(config.name_or_path, trust_remote_code=False).get_vocab()
    except Exception:  # there is none, or of a kind that cannot be read here: then the sizes must do
        return None
    return vocabulary


def fingerprint(model: nn.Module) -> int:
    """Computes a checksum (CRC-32) of all weights and buffers, which shows whether two models are the same."""
    checksum = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        checksum = zlib.crc32(plain.numpy().data, checksum)
    return checksum
