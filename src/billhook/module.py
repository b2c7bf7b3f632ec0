"""The LightningModule: a Hugging Face model with its loss, metrics, optimizer and learning-rate schedule."""

from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
import transformers
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from transformers import PretrainedConfig, PreTrainedModel

from billhook.assets import model_path
from billhook.run import training_steps
from billhook.schedules import Step, check_step, resolve_step
from billhook.structure.meta import check_checkpoint
from billhook.structure.shape import load_shape, save_shape
from billhook.structure.shaped import load_shaped, says_shape

Task = Literal["causal-lm", "seq2seq-lm", "masked-lm", "sequence-classification", "image-classification"]
Decay = Literal["cosine", "linear", "constant"]
AUTO_CLASSES: dict[str, Any] = {
    "causal-lm": transformers.AutoModelForCausalLM,
    "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "image-classification": transformers.AutoModelForImageClassification,
}


class ShapeInCheckpoint:
    """For a LightningModule that holds a Hugging Face model: its checkpoints carry the shape, and loading them restores it.

    Callbacks that change shapes do this for any module in a fit; with this class before `LightningModule` among the bases,
    `load_from_checkpoint` does it too.
    """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the shape."""
        assert isinstance(self, nn.Module)
        save_shape(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the shape before weights are loaded."""
        assert isinstance(self, nn.Module)
        load_shape(self, checkpoint)


class TransformerModule(ShapeInCheckpoint, pl.LightningModule):
    """A Hugging Face model in training: loss from the model, token-weighted perplexity or accuracy, AdamW, warm-up and decay.

    Logs `train_loss`, `val_loss`, and `val_perplexity` or `val_accuracy` (`test_...` likewise).

    Args:
        model: `"tiny"` (the embedded Llama), a hub name, a folder (whatever `bh.save` wrote, too), a `config.json` file or a
            config (random weights), or a ready `PreTrainedModel`.
        task: What the model is to do; it chooses the class and the metric.
        lr: The highest learning rate.
        weight_decay: AdamW's weight decay; never on biases and norms (parameters with one dimension).
        warmup: Steps (int) or fraction of training (float) over which the learning rate rises from 0.
        decay: How the learning rate falls to 0 after that, or stays.
        num_labels: Classes, for the classification tasks; by default the checkpoint's.
        dtype: The dtype of the weights. `"auto"` takes the checkpoint's own.
        attn_implementation: `"sdpa"`, `"eager"`, `"flash_attention_2"`, ...; by default what transformers chooses.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        gguf_file: The name of a GGUF file in the folder or repository `model`; its weights are dequantised.
        trust_remote_code: Run the modelling code that a repository brings. Off unless asked.

    Raises:
        ValueError: If a number is out of range, or the model's name leads nowhere.
    """

    def __init__(
        self,
        model: str | PretrainedConfig | PreTrainedModel = "tiny",
        task: Task = "causal-lm",
        lr: float = 3e-4,
        weight_decay: float = 0.01,
        warmup: Step = 0.0,
        decay: Decay = "cosine",
        num_labels: int | None = None,
        dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        gguf_file: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if task not in AUTO_CLASSES:
            raise ValueError(f"task={task!r} must be one of {', '.join(AUTO_CLASSES)}")
        if lr <= 0:
            raise ValueError(f"lr={lr} must be above 0")
        check_step(warmup, "warmup")
        self.save_hyperparameters(ignore=[] if isinstance(model, str) else ["model"])
        self.task, self.lr, self.weight_decay, self.warmup, self.decay = task, lr, weight_decay, warmup, decay
        if isinstance(model, PreTrainedModel):
            self.model = model
        else:
            options = {
                "dtype": dtype,
                "attn_implementation": attn_implementation,
                "trust_remote_code": trust_remote_code,
            }
            self.model = load_model(model, task, options, num_labels, gguf_file)
        if gradient_checkpointing:
            enable = getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        classes = self.model.config.num_labels
        self.metrics = nn.ModuleDict({f"{stage}_metric": _metric(task, classes) for stage in ("val", "test")})
        self.metric_name = "accuracy" if task.endswith("classification") else "perplexity"
        self.model.train()
        self.example_input_array = self._example()

    def _example(self) -> dict[str, Tensor] | None:
        """A batch of one example, for tracing and summaries."""
        if self.model.main_input_name != "input_ids":
            return None
        ids = torch.zeros(1, 8, dtype=torch.long)
        return {"input_ids": ids} | ({"decoder_input_ids": ids} if self.task == "seq2seq-lm" else {})

    def setup(self, stage: str) -> None:
        """Tells a classifier which token is padding, where only the tokenizer knows."""
        config = self.model.config.get_text_config(decoder=True)
        if self.task == "sequence-classification" and config.pad_token_id is None:
            tokenizer = getattr(self.trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
            config.pad_token_id = getattr(tokenizer, "pad_token_id", None)

    def forward(self, **batch: Tensor) -> Any:  # noqa: ANN401 - a ModelOutput whose class depends on the model
        """The model's own output for a batch of its own arguments."""
        return self.model(**batch)

    def generate(self, **arguments: Any) -> Tensor:  # noqa: ANN401 - transformers' own arguments
        """Token ids from `model.generate` with the same arguments."""
        generated: Tensor = self.model.generate(**arguments)  # type: ignore[operator]
        return generated

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The model's loss."""
        loss: Tensor = self(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs `val_loss` and the task's metric."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs `test_loss` and the task's metric."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Classes; generated ids (sequence to sequence; up to the generation config's `max_new_tokens`, or 128); or logits."""
        if self.task == "seq2seq-lm":
            length = getattr(self.model.generation_config, "max_new_tokens", None) or 128
            return self.generate(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), max_new_tokens=length)
        logits: Tensor = self(**batch).logits
        return logits.argmax(-1) if self.task.endswith("classification") else logits

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        output, labels = self(**batch), batch["labels"]
        metric = cast(Metric, self.metrics[f"{stage}_metric"])
        if isinstance(metric, TokenPerplexity):
            # a causal model predicts each label but the first
            predicted = labels[:, 1:] if self.task == "causal-lm" else labels
            weight = (predicted != -100).sum()
            metric.update(output.loss, weight)
        else:
            weight = torch.tensor(len(labels))
            metric.update(output.logits, labels)
        self.log(f"{stage}_loss", output.loss, batch_size=int(weight), sync_dist=True)
        self.log(f"{stage}_{self.metric_name}", metric, prog_bar=True, batch_size=int(weight))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW (fused where it can be) with warm-up and decay by optimizer step."""
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        # under float16 the scaler and gradient clipping both want to unscale: the fused step leaves no room for that
        fused = self.trainer.precision != "16-mixed" and all(p.device.type in ("cpu", "cuda") for p in trained)
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.lr, fused=fused)
        total = training_steps(self.trainer)
        if total is None:
            if self.decay != "constant" or (isinstance(self.warmup, float) and self.warmup > 0):
                raise ValueError(
                    f"decay={self.decay!r} and warmup={self.warmup} need the length of training: set max_steps, "
                    "or use decay='constant' with warmup as a number of steps"
                )
            total = int(self.warmup)
        kind = {"constant": "constant_with_warmup"}.get(self.decay, self.decay)
        warmup = self.warmup if isinstance(self.warmup, int) else resolve_step(self.warmup, total, "warmup")
        scheduler = transformers.get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}


class TokenPerplexity(Metric):
    """exp of the mean loss per token, whatever the number of tokens in each batch: exp(sum of losses / number of tokens)."""

    full_state_update = False
    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, tokens: Tensor) -> None:
        """Takes a batch's mean loss and the number of tokens that it is the mean of."""
        # not in place: after trainer.validate the states are inference tensors, which a fit may not write into
        self.total = self.total + loss.detach().float() * tokens
        self.tokens = self.tokens + tokens

    def compute(self) -> Tensor:
        """exp(sum of losses / number of tokens)."""
        return torch.exp(self.total / self.tokens)


def load_model(
    model: str | PretrainedConfig,
    task: str,
    options: dict[str, Any],
    num_labels: int | None = None,
    gguf_file: str | None = None,
) -> PreTrainedModel:
    """The model that a name, a folder, a config.json or a config means (see `TransformerModule`)."""
    options = {k: v for k, v in options.items() if v is not None}
    labels = {} if num_labels is None else {"num_labels": num_labels}
    auto = AUTO_CLASSES[task]
    if isinstance(model, str) and model.endswith(".json"):
        if not Path(model).is_file():
            raise ValueError(f"model: there is no config file '{model}'")
        model = transformers.AutoConfig.from_pretrained(model)
    if isinstance(model, PretrainedConfig):
        for name, value in labels.items():
            setattr(model, name, value)
        from_config: PreTrainedModel = auto.from_config(model, **options)
        return from_config
    name = model_path(model)
    if gguf_file is None:
        check_checkpoint(name)
        if says_shape(name):
            kind = _class_for(auto, transformers.AutoConfig.from_pretrained(name), task)
            return load_shaped(kind, name, options.get("dtype", "auto"), options.get("attn_implementation"), num_labels)
    loaded: PreTrainedModel = auto.from_pretrained(name, gguf_file=gguf_file, **options, **labels)
    return loaded if gguf_file is None else _plain(loaded)


def _class_for(auto: Any, config: PretrainedConfig, task: str) -> type[PreTrainedModel]:  # noqa: ANN401 - an auto class
    """The class that an auto class takes for a config: of several, the one that it names, or else the first.

    Raises:
        ValueError: If it has none.
    """
    found = auto._model_mapping.get(type(config), ())
    kinds: list[type[PreTrainedModel]] = list(found) if isinstance(found, tuple | list) else [found]
    if not kinds:
        raise ValueError(f"task={task!r}: transformers has no class for it of the family '{config.model_type}'")
    return next((kind for kind in kinds if kind.__name__ in (config.architectures or ())), kinds[0])


def _plain(loaded: PreTrainedModel) -> PreTrainedModel:
    """A copy that no longer says it was quantised: a model loaded from GGUF refuses to be saved."""
    config = loaded.config
    del config.quantization_config
    plain: PreTrainedModel = type(loaded)._from_config(config, dtype=loaded.dtype)  # type: ignore[no-untyped-call]
    plain.load_state_dict(loaded.state_dict())
    return plain


def _metric(task: str, num_labels: int | None) -> Metric:
    if task.endswith("classification"):
        return MulticlassAccuracy(num_classes=num_labels or 2, average="micro")
    return TokenPerplexity()
