"""The LightningModule: a Hugging Face model with its loss, metrics, optimizer and learning-rate schedule."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
import transformers
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from lightning_utilities.core.rank_zero import rank_zero_info
from peft import LoraConfig
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PretrainedConfig, PreTrainedModel

from billhook.adapters.lora import LoRA, attach, from_plain, to_plain
from billhook.arguments import check_number, check_one_of, check_types
from billhook.checkpoints.pretrained import AUTO_CLASSES, Task, load_model
from billhook.engine.sharding import is_sharded, shard
from billhook.engine.state import StepRandom
from billhook.engine.store import store_of
from billhook.engine.walk import blocks_of
from billhook.fit.checkpoint_hooks import load_as_before, load_in_shape
from billhook.fit.resume import ShapeInCheckpoint
from billhook.fit.run import training_steps
from billhook.model.find import find_transformer
from billhook.schedules import Step, check_step, resolve_step
from billhook.tracing.axes import leaves
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import common_module
from billhook.tracing.roles import Attention
from billhook.tracing.trace import trace
from billhook.training.distillation import Distillation, Teacher, check_teacher
from billhook.training.loader import batches_seen
from billhook.training.metrics import counted, metric_name, metrics_of, observed, written

Trainable = Literal["all", "attention"] | list[str]
"""All parameters, those of attention, or those whose names match one of some glob patterns."""


def check_trainable(trainable: Trainable, model: object) -> None:
    """Refuses a value that is legal for no model, and a model that is streamed, of which nothing trains."""
    if isinstance(model, nn.Module) and not store_of(model).trains:
        raise ValueError("model: it is streamed, and training needs all weights in memory: load it with bh.load")
    patterns = isinstance(trainable, Sequence) and not isinstance(trainable, str) and all(isinstance(p, str) for p in trainable)
    if trainable not in ("all", "attention") and not (patterns and trainable):
        raise ValueError(f"trainable={trainable!r} must be 'all', 'attention' or patterns of names, as in ['*.k_proj.*']")


def freeze_others(model: PreTrainedModel, trainable: Trainable, classifies: bool = False) -> None:
    """Freezes all other parameters, in place; parameters that were frozen before stay so, and with `"all"` nothing changes.

    A tied parameter trains if one of its names matches. What `classifies` has outside of the base model is a head that may be
    new, and so trains with attention. A refusal leaves the model as it was.
    """
    if trainable == "all":
        return
    parameters = list(model.named_parameters(remove_duplicate=False))
    if trainable == "attention":
        names = set(attention_parameters(model))
        base = set(model.base_model.parameters()) if classifies else {parameter for _, parameter in parameters}
        chosen = {parameter for name, parameter in parameters if name in names or parameter not in base}
    else:
        for pattern in trainable:
            if not any(fnmatchcase(name, pattern) for name, _ in parameters):
                shown = [name for name, _ in parameters[:3]]
                raise ValueError(f"trainable={pattern!r} matches none of the {len(parameters)} parameters, such as {shown}")
        chosen = {parameter for name, parameter in parameters if any(fnmatchcase(name, pattern) for pattern in trainable)}
    for _, parameter in parameters:
        if parameter not in chosen:
            parameter.requires_grad_(False)


def attention_parameters(model: nn.Module, structure: Structure | None = None) -> list[str]:
    """Finds the parameters of all attentions of a model: projections, their biases, norms and position biases within.

    An attention is the innermost module that holds the projections of queries, keys, values and output, as `trace` finds them by
    the model's operations, not by names; modules that compute the same as attention count too (state-space layers of Mamba-2).
    If that module holds a feed-forward too, only projections and parameters with heads, or dimensions of heads, count.
    """
    subject = find_transformer(model)
    structure = structure or trace(subject)
    names = {name for attention in structure.attention for name in _of(attention, structure)}
    if not names:
        raise ValueError(f"model: {type(subject).__name__} has no attention that can be told apart")
    return [name for name, _ in subject.named_parameters() if name in names]


def _of(attention: Attention, structure: Structure) -> set[str]:
    """Finds the parameters of one attention."""
    projections = {part.name for part in (*attention.q, *attention.k, *attention.v, *attention.o)}
    where = common_module(list(projections))
    others = {part.name for mlp in structure.feed_forward for part in (*mlp.gate, *mlp.up, *mlp.down)} - projections
    if where and not any(name.startswith(f"{where}.") for name in others):
        return {name for name in structure.shapes if name.startswith(f"{where}.")}
    dimensions = {*attention.heads, *attention.query_key, *attention.value}
    modules = {name.rpartition(".")[0] for name in projections}
    with_heads = {name for name, axes in structure.axes.items() if any(dimensions & set(leaves(axis)) for axis in axes)}
    return {name for name in structure.shapes if name.rpartition(".")[0] in modules or name in with_heads}


Decay = Literal["cosine", "linear", "constant"]
TEACHER, NOISE, STEPS = "billhook_teacher", "billhook_noise", "billhook_steps"
"""Where Lightning checkpoints keep the checksum of the teacher's weights, the seed of random numbers, and the fit's length."""


class TransformerModule(ShapeInCheckpoint, pl.LightningModule):
    """A Hugging Face model in training: loss from the model, token-weighted perplexity or accuracy, AdamW, warm-up and decay.

    Logs `train_loss`, `val_loss`, and `val_perplexity` or `val_accuracy` (`test_...` likewise); of images of more than five
    classes also `val_accuracy_top5`, for which the right class may be any of the five likeliest. Of `feature-extraction` (CLIP)
    the loss is contrastive within a device's batch, and `val_accuracy` the share of images there whose own caption suits them
    best.

    After pruning, three ways restore quality. Full training (`lora=None`) needs memory for gradients and AdamW's state, 12 bytes
    a weight in float32, and enough text. `lora` trains a few weights next to frozen ones, for little memory or text. It is either
    attached while callbacks remove units in the same fit, and is then cut too, or attached to a folder that was pruned before
    (`billhook prune-heads MODEL OUT`, then `model: OUT`), as in the paper and as `KVHeadConversion` needs, which pools no
    adapters. `Export` writes merged weights in both cases. `distillation` combines with all of them.

    Args:
        model: `"tiny"` (the embedded Llama), a hub name, a folder (whatever `bh.save` wrote, too), a `config.json` file or a
            config (random weights), or a ready `PreTrainedModel`.
        task: Task of the model; it decides the class and the metric.
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
        lora: Freeze the model and train LoRA on its linears: `{}` for the defaults of LLM-Pruner (r 8, alpha 16, dropout 0.05,
            all linears; the paper's `lr` is 1e-4), `{r: 16}` and so on for others, or PEFT's own `peft.LoraConfig` by
            `class_path`. The head of a classifier trains in full, too.
        distillation: Learn from a teacher too, by (1 - weight) CE + weight T^2 KL(teacher || student) + hidden MSE, as
            `Distillation` says: `{}` for temperature T 2, weight 0.5, hidden 0 and as teacher the model as it is now, before it
            is cut; `{teacher: FOLDER, weight: 0.9}` and so on for others, as a model needs that is cut already. It costs a
            forward pass of the teacher in each step and its weights in memory. `train_loss` is then the sum, `train_kl` the KL in
            it; validation stays as it is.
        trainable: Which parameters train: `"all"` (those that a ready model has not frozen), `"attention"` (its projections, with
            biases and norms within, of whatever family, and the head of a classifier), or those whose names in the model match
            one of some glob patterns, as in `["*.k_proj.*", "*.v_proj.*"]`. The others are frozen: they get no gradient and no
            optimizer state. Not with `lora`, which decides itself which parameters train.

    Raises:
        ValueError: If a number is out of range, the model's name leads nowhere, it has adapters already and `lora` is given,
            `trainable` matches nothing or is given with `lora`, or the teacher has another vocabulary; on resuming, if the
            teacher is not the one that the run started with.

    Example:
        >>> import billhook as bh
        >>> module = bh.TransformerModule("tiny", lr=1e-4, lora=bh.training.LoRA(r=4))
        >>> module.metric_name, sum(p.numel() for p in module.parameters() if p.requires_grad)
        ('perplexity', 63488)
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
        lora: LoRA | LoraConfig | None = None,
        distillation: Distillation | None = None,
        trainable: Trainable = "all",
    ) -> None:
        check_types(TransformerModule, {k: v for k, v in locals().items() if not isinstance(v, dict)})  # as checkpoints hold LoRA
        super().__init__()
        check_one_of("task", task, AUTO_CLASSES)
        check_number("lr", lr, above=0)
        check_step(warmup, "warmup")
        check_trainable(trainable, model)
        if distillation is not None and task == "feature-extraction":
            raise ValueError("distillation: a teacher of logits has none to give for task='feature-extraction'; leave it out")
        if lora is not None and trainable != "all":
            raise ValueError(f"trainable={trainable!r} and lora: with LoRA the adapters train and nothing else; leave one out")
        self.save_hyperparameters(ignore=[] if isinstance(model, str) else ["model"])
        lora, distillation = self._plain_hyperparameters(lora, distillation)
        self.task, self.lr, self.weight_decay, self.warmup, self.decay = task, lr, weight_decay, warmup, decay
        options = {"dtype": dtype, "attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
        if not isinstance(model, PreTrainedModel):
            model = load_model(model, task, options, num_labels, gguf_file)
        self.model = model
        self.noise = StepRandom()
        self._steps: int | None = None
        self.teacher = None if distillation is None else self._teacher(distillation, options)
        if lora is not None:
            attach(self.model, lora, classifies=task.endswith("classification"))
        freeze_others(self.model, trainable, classifies=task.endswith("classification"))
        if gradient_checkpointing:
            enable = getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        classes = self.model.config.num_labels
        self.metrics = nn.ModuleDict({stage: nn.ModuleDict(metrics_of(task, classes)) for stage in ("val", "test")})
        self.metric_name = metric_name(task)
        self.model.train()
        if self.model.main_input_name == "input_ids" and task != "feature-extraction":  # CLIP takes images beside
            ids = torch.zeros(1, 8, dtype=torch.long)
            self.example_input_array = {"input_ids": ids} | ({"decoder_input_ids": ids} if task == "seq2seq-lm" else {})

    def _plain_hyperparameters(
        self, lora: LoRA | LoraConfig | None, distillation: Distillation | None
    ) -> tuple[LoRA | LoraConfig | None, Distillation | None]:
        """Stores both as plain data in checkpoints, which load without any class, and reads them from such data."""
        if isinstance(setting := self.hparams.get("lora"), LoRA | LoraConfig):
            self.hparams["lora"] = to_plain(setting)
        if isinstance(setting := self.hparams.get("distillation"), Distillation):
            self.hparams["distillation"] = asdict(setting)
        lora = from_plain(lora) if isinstance(lora, dict) else lora
        return lora, Distillation(**distillation) if isinstance(distillation, dict) else distillation

    def _teacher(self, distillation: Distillation, options: dict[str, Any]) -> Teacher:
        """Makes the teacher: a copy of the model as it is now, or another model."""
        if distillation.teacher is None:
            model = copy.deepcopy(self.model)
        else:
            classifies = self.task.endswith("classification")
            model = load_model(distillation.teacher, self.task, options)
            check_teacher(self.model, model, distillation, classifies)
        return Teacher(model, distillation, causal=self.task == "causal-lm")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the shape, how LoRA is scaled, the seed of dropout, and which teacher there is."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[NOISE], checkpoint[STEPS] = self.noise.state_dict(), self._steps
        if self.teacher is not None:
            checkpoint[TEACHER] = self.teacher.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to continue with another teacher; sets the shape before weights are loaded."""
        resuming = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if resuming and self.teacher is not None and checkpoint.get(TEACHER) not in (None, self.teacher.fingerprint):
            raise ValueError(
                f"distillation: teacher={self.teacher.settings.teacher!r} has other weights than the teacher with which the run "
                "of the checkpoint started: make the module of the same model as then, or name the teacher"
            )
        super().on_load_checkpoint(checkpoint)
        if resuming:
            self.noise.load_state_dict(checkpoint.get(NOISE, {}))
            self._steps = checkpoint.get(STEPS)

    def configure_model(self) -> None:
        """Shards blocks, and what is around them, over ranks, where `ModelParallelStrategy` (FSDP2) asks for it."""
        if self._trainer is None or not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        load_in_shape(self.trainer, self)
        if not is_sharded(self.model):
            assert self.device_mesh is not None
            shard(self.model, blocks_of(self.model), self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Tells a classifier which token is padding, where only the tokenizer knows."""
        tokenizer = getattr(self.trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        for model in [self.model] + ([] if self.teacher is None else [self.teacher.model]):
            config = model.config.get_text_config(decoder=True)
            if self.task == "sequence-classification" and config.pad_token_id is None:
                config.pad_token_id = getattr(tokenizer, "pad_token_id", None)

    def teardown(self, stage: str) -> None:
        """Leaves the strategy as it was found."""
        if self._trainer is not None:
            load_as_before(self.trainer)

    def forward(self, **batch: Tensor) -> Any:  # noqa: ANN401 - a ModelOutput whose class depends on the model
        """Returns the model's own output for a batch of its own arguments."""
        return self.model(**batch)

    def generate(self, **arguments: Any) -> Tensor:  # noqa: ANN401 - transformers' own arguments
        """Returns token ids from `model.generate` with the same arguments."""
        generated: Tensor = self.model.generate(**arguments)  # type: ignore[operator]
        return generated

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the model's loss; with a teacher, the sum of `Distillation`."""
        noise = self.noise.drawn(self.device, batches_seen(self.trainer), self.global_rank) if self._trainer else nullcontext()
        with noise:  # the same in a resumed run
            output = self(**batch, **({} if self.teacher is None else self.teacher.asks))
        loss: Tensor = output.loss
        if self.teacher is not None:
            self.teacher.follow(self.model)
            loss, divergence = self.teacher.loss(output, batch)
            self.log("train_kl", divergence)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_train_start(self) -> None:
        """Draws the seed of dropout, if it is in no checkpoint; refuses teachers that differ over ranks."""
        if self.teacher is not None:
            checksum = torch.tensor(self.teacher.fingerprint, device=self.device)
            if (cast(Tensor, self.all_gather(checksum)) != checksum).any():
                raise ValueError(
                    "distillation: the ranks have teachers with different weights: seed all ranks alike (seed_everything) where "
                    "weights of the model are new, or name the teacher"
                )
        if self.trainer.global_step == 0 and self.trainer.ckpt_path is None:
            self.noise = StepRandom()
        self.noise.seed = self.trainer.strategy.broadcast(self.noise.draw())

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs `val_loss` and the task's metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs `test_loss` and the task's metrics."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns classes, generated ids (sequence to sequence; see `written`), similarities to captions, or logits."""
        if self.task in ("seq2seq-lm", "speech-seq2seq"):
            return written(self.model, batch)
        output = self(**batch)
        logits: Tensor = output.logits_per_image if self.task == "feature-extraction" else output.logits
        return logits.argmax(-1) if self.task.endswith("classification") else logits

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        output, weight = self(**batch), counted(batch, self.task == "causal-lm")
        self.log(f"{stage}_loss", output.loss, batch_size=int(weight), sync_dist=True)
        for name, metric in cast(dict[str, Metric], self.metrics[stage]).items():
            metric.update(*observed(metric, output, batch, weight))
            self.log(f"{stage}_{name}", metric, prog_bar=True, batch_size=int(weight))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Makes AdamW (fused where possible) with warm-up and decay by optimizer step."""
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
        if (
            self.trainer.ckpt_path
            and self._steps not in (None, total)
            and (self.decay != "constant" or isinstance(self.warmup, float))
        ):
            rank_zero_info(
                f"billhook: the fit of the checkpoint was to take {self._steps} steps, and this one takes {total}: the learning "
                "rate continues as if that had been so from the start"
            )
        self._steps = total
        kind = {"constant": "constant_with_warmup"}.get(self.decay, self.decay)
        warmup = self.warmup if isinstance(self.warmup, int) else resolve_step(self.warmup, total, "warmup")
        scheduler = transformers.get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}
