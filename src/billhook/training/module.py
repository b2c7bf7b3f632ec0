"""LightningModule with loss, metrics, optimizer, and learning-rate schedule."""

import json
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from fnmatch import fnmatchcase
from itertools import chain
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
from torchmetrics import MeanMetric, Metric
from transformers import PretrainedConfig, PreTrainedModel

from billhook.adapters.lora import LoRA, attach
from billhook.arguments import check_number, check_one_of, check_types
from billhook.checkpoints.pretrained import AUTO_CLASSES, Task, load_model
from billhook.engine import StepRandom, blocks_of, is_sharded, shard, store_of
from billhook.fit.checkpoint_hooks import load_as_before, load_in_shape
from billhook.fit.resume import ShapeInCheckpoint
from billhook.fit.run import training_steps
from billhook.model import find_transformer, stacks_of
from billhook.schedules import Step, check_step, resolve_step
from billhook.tracing.axes import leaves
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import common_module
from billhook.tracing.roles import Part
from billhook.tracing.trace import trace
from billhook.training.distillation import Distillation, make_teacher
from billhook.training.loader import batches_seen
from billhook.training.metrics import TokenPerplexity, metric_name, metrics_of

Trainable = Literal["all", "attention", "router"] | list[str]
"""All parameters, those of attention or of routers of experts, or parameters whose names match a glob pattern."""
Decay = Literal["cosine", "linear", "constant"]
MAX_NEW_TOKENS = 128  # default limit for generation, if the generation config has no `max_new_tokens`
TEACHER, RANDOM, STEPS = "billhook_teacher", "billhook_noise", "billhook_steps"
"""Keys of Lightning checkpoints: the teacher's checksum, the random state, and the length of training."""


def check_trainable(trainable: Trainable, model: object) -> None:
    """Raises an error for an illegal value, or for a streamed model, which cannot be trained."""
    if isinstance(model, nn.Module) and not store_of(model).trains:
        raise ValueError("model: training needs all weights in memory, but the model is streamed. Load it with bh.load.")
    patterns = isinstance(trainable, Sequence) and not isinstance(trainable, str) and all(isinstance(p, str) for p in trainable)
    if trainable not in ("all", "attention", "router") and not (patterns and trainable):
        raise ValueError(f"trainable={trainable!r} must be 'all', 'attention', 'router', or name patterns such as ['*.k_proj.*']")


def freeze_others(model: PreTrainedModel, trainable: Trainable, classifies: bool = False) -> None:
    """Freezes all parameters except the trainable ones, in place, and unfreezes none.

    A tied parameter trains if one of its names matches. With `classifies`, unless patterns are given, parameters outside the base
    model (the classification head, which may be new) train too. If an error is raised, the model is unchanged.
    """
    if trainable == "all":
        return
    parameters = list(model.named_parameters(remove_duplicate=False))
    if trainable in ("attention", "router"):
        names = set(attention_parameters(model) if trainable == "attention" else router_parameters(model))
        base = set(model.base_model.parameters()) if classifies else {parameter for _, parameter in parameters}
        trained = {parameter for name, parameter in parameters if name in names or parameter not in base}
    else:
        trained = set()
        for pattern in trainable:
            matching = {parameter for name, parameter in parameters if fnmatchcase(name, pattern)}
            if not matching:
                some = [name for name, _ in parameters[:3]]
                raise ValueError(f"trainable={pattern!r} matches none of the {len(parameters)} parameters, such as {some}")
            trained |= matching
    for _, parameter in parameters:
        if parameter not in trained:
            parameter.requires_grad_(False)


def attention_parameters(model: nn.Module, structure: Structure | None = None) -> list[str]:
    """Returns the parameter names of all attention modules, including biases and norms.

    An attention module is the innermost module with the query, key, value, and output projections. `trace` identifies them by
    operations, not by names, so equivalent modules are included (state-space layers of Mamba-2). If the module also contains an
    MLP, only projections and parameters with heads, or dimensions of heads, are returned.

    Raises:
        ValueError: If there is no attention module.
    """
    subject = find_transformer(model)
    structure = structure or trace(subject)
    names, mlp_layers = set[str](), set[str]()
    for mlp in structure.feed_forward:
        mlp_layers |= layer_names((*mlp.gate, *mlp.up, *mlp.down))
    for attention in structure.attention:
        projections = layer_names((*attention.q, *attention.k, *attention.v, *attention.o))
        module = common_module(list(projections))
        if module and not names_within(module, mlp_layers - projections):
            names |= names_within(module, structure.shapes)
            continue
        dimensions = {*attention.heads, *attention.query_key, *attention.value}
        layers = {name.rpartition(".")[0] for name in projections}
        for name in structure.shapes:
            axes = chain.from_iterable(map(leaves, structure.axes.get(name, ())))
            if name.rpartition(".")[0] in layers or not dimensions.isdisjoint(axes):
                names.add(name)
    if not names:
        raise ValueError(f"trainable='attention': no attention module was found in {type(subject).__name__}. Use name patterns.")
    return [name for name, _ in subject.named_parameters() if name in names]


def router_parameters(model: nn.Module) -> list[str]:
    """Returns the names of parameters of experts outside of the experts themselves.

    Raises:
        ValueError: If there are no experts.
    """
    subject = find_transformer(model)
    members = {member.name for group in trace(subject).groups if group.kind == "expert" for member in group.members}
    routers = [
        name
        for name, parameter in subject.named_parameters()
        if name in members and parameter.dim() < 3 and not stacks_of(subject.get_submodule(name.rpartition(".")[0]))
    ]
    if not routers:
        raise ValueError(f"trainable='router': no router of experts was found in {type(subject).__name__}. Use name patterns.")
    return routers


def layer_names(parts: Iterable[Part]) -> set[str]:
    """Returns the parameter names of traced layers."""
    return {part.name for part in parts}


def names_within(module: str, names: Iterable[str]) -> set[str]:
    """Returns the names of parameters within a module."""
    return {name for name in names if name.startswith(f"{module}.")}


class TransformerModule(ShapeInCheckpoint, pl.LightningModule):
    """LightningModule for a Hugging Face model, with optional LoRA and distillation.

    The loss is the model's. It logs `train_loss`, `val_loss`, and `val_perplexity` (per token) or `val_accuracy`, and the same
    with `test_`. Image classification with more than five classes also logs `val_accuracy_top5`. For `feature-extraction` (CLIP),
    the loss is contrastive within a device's batch, and `val_accuracy` is the fraction of its images whose best match is their
    own caption.

    Three kinds of recovery training are available after pruning. Full training (`lora=None`) needs enough text, and memory for
    gradients and AdamW state (12 bytes per weight in float32). `lora` trains a few weights next to frozen ones and needs less of
    both. Attach it in the same run in which callbacks remove units (the adapters are then pruned too), or load a pruned folder
    (`billhook prune-heads MODEL OUT`, then `model: OUT`), as in the paper. `KVHeadConversion` requires the latter, because it
    does not pool adapters. `Export` writes merged weights in both cases. `distillation` can be combined with all of them.

    Args:
        model: `"tiny"` (the packaged Llama), a Hub name, a folder (also one written by `bh.save`), a `config.json` file or a
            config (random weights), or a `PreTrainedModel`.
        task: Task of the model, which determines its class and metric.
        lr: Peak learning rate.
        weight_decay: Weight decay of AdamW. Biases and norms (parameters with one dimension) have none.
        warmup: Steps (int) or fraction of training (float) over which the learning rate rises from 0.
        decay: Shape of the learning rate after warm-up: `"cosine"` or `"linear"` decay to 0, or `"constant"`.
        num_labels: Number of classes, for classification tasks. Defaults to the checkpoint's.
        dtype: Data type of the weights. `"auto"` uses the checkpoint's.
        attn_implementation: `"sdpa"`, `"eager"`, `"flash_attention_2"`, and so on. Defaults to the choice of transformers.
        gradient_checkpointing: If True, recomputes activations in the backward pass to save memory.
        gguf_file: Name of a GGUF file in the folder or repository `model`. Its weights are dequantized.
        trust_remote_code: If True, runs modeling code from the repository. Defaults to False.
        lora: Freezes the model and trains LoRA adapters on its linear layers. `{}` uses the defaults of LLM-Pruner (r 8, alpha
            16, dropout 0.05, all linear layers; the paper's `lr` is 1e-4), `{r: 16}` changes a setting, and `class_path` selects
            a `peft.LoraConfig`. A classification head is trained in full.
        distillation: Adds a teacher to the loss: (1 - weight) CE + weight T^2 KL(teacher || student) + hidden MSE. See
            `Distillation`. `{}` uses temperature T 1, weight 1, hidden 0, and the current model, before pruning, as the teacher.
            If the model is pruned already, name the teacher: `{teacher: FOLDER, weight: 0.9}`. Every step runs a
            forward pass of the teacher, whose weights stay in memory. `train_loss` is the sum and `train_kl` its KL term;
            validation is unchanged.
        trainable: Parameters to train: `"all"` (except parameters that are frozen in a `PreTrainedModel`), `"attention"`
            (projections, biases, and norms of attention modules), `"router"` (the routers of experts,
            https://arxiv.org/abs/2603.02217), or a list of glob patterns of parameter names, such as `["*.k_proj.*",
            "*.v_proj.*"]`. With the first three a classification head trains, too. All others are frozen, without gradients or
            optimizer state.
            Cannot be combined with `lora`.

    Raises:
        ValueError: If a number is out of range, the model is not found, the model already has adapters and `lora` is set,
            `trainable` matches no parameter or is combined with `lora`, or the teacher has a different vocabulary. On resuming,
            if the teacher differs from the teacher of the checkpoint.

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
        # checkpoints store lora and distillation as dictionaries
        check_types(TransformerModule, {k: v for k, v in locals().items() if not isinstance(v, dict)})
        super().__init__()
        check_one_of("task", task, AUTO_CLASSES)
        check_number("lr", lr, above=0)
        check_step(warmup, "warmup")
        check_trainable(trainable, model)
        if distillation is not None and task == "feature-extraction":
            raise ValueError(
                "distillation does not support task='feature-extraction', which has no class logits. Remove distillation."
            )
        if lora is not None and trainable != "all":
            raise ValueError(f"trainable={trainable!r} cannot be combined with lora, which trains only adapters. Set one.")
        self.save_hyperparameters(ignore=[] if isinstance(model, str) else ["model"])
        lora, distillation = self._plain_hyperparameters(lora, distillation)
        self.task, self.lr, self.weight_decay, self.warmup, self.decay = task, lr, weight_decay, warmup, decay
        options = {"dtype": dtype, "attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
        if not isinstance(model, PreTrainedModel):
            model = load_model(model, task, options, num_labels, gguf_file)
        self.model = model
        self.step_random = StepRandom()
        self._steps: int | None = None
        self.teacher = None if distillation is None else make_teacher(self.model, distillation, task, options)
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
        if self.model.main_input_name == "input_ids" and task != "feature-extraction":  # CLIP also needs images
            ids = torch.zeros(1, 8, dtype=torch.long)
            self.example_input_array = {"input_ids": ids} | ({"decoder_input_ids": ids} if task == "seq2seq-lm" else {})

    def _plain_hyperparameters(
        self, lora: LoRA | LoraConfig | None, distillation: Distillation | None
    ) -> tuple[LoRA | LoraConfig | None, Distillation | None]:
        """Stores both settings as plain data in checkpoints, and restores them from it."""
        saved_lora, saved_distillation = self.hparams.get("lora"), self.hparams.get("distillation")
        if isinstance(saved_lora, LoRA | LoraConfig):
            plain = asdict(saved_lora) if isinstance(saved_lora, LoRA) else saved_lora.to_dict()  # type: ignore[no-untyped-call]
            self.hparams["lora"] = json.loads(json.dumps(plain, default=sorted))  # PEFT's sets of names
        if isinstance(saved_distillation, Distillation):
            self.hparams["distillation"] = asdict(saved_distillation)
        if isinstance(lora, dict):
            settings = {name: value for name, value in lora.items() if name != "peft_type"}
            lora = LoraConfig(**settings) if "peft_type" in lora else LoRA(**settings)
        return lora, Distillation(**distillation) if isinstance(distillation, dict) else distillation

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the shape, LoRA scaling, random state, length of training, and teacher checksum."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[RANDOM], checkpoint[STEPS] = self.step_random.state_dict(), self._steps
        if self.teacher is not None:
            checkpoint[TEACHER] = self.teacher.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks the teacher, and restores the shape before weights are loaded.

        Raises:
            ValueError: If the teacher's weights differ.
        """
        resuming = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if resuming and self.teacher is not None and checkpoint.get(TEACHER) not in (None, self.teacher.fingerprint):
            raise ValueError(
                f"distillation: the weights of teacher={self.teacher.settings.teacher!r} differ from those in the checkpoint's "
                "run. Create the module from the same model as in that run, or name its teacher."
            )
        super().on_load_checkpoint(checkpoint)
        if resuming:
            self.step_random.load_state_dict(checkpoint.get(RANDOM, {}))
            self._steps = checkpoint.get(STEPS)

    def configure_model(self) -> None:
        """Shards blocks and the remaining layers over ranks under `ModelParallelStrategy` (FSDP2)."""
        if self._trainer is None or not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        load_in_shape(self.trainer, self)
        if not is_sharded(self.model):
            assert self.device_mesh is not None
            shard(self.model, blocks_of(self.model), self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Sets the padding token of a classifier from the tokenizer, if its config has none."""
        tokenizer = getattr(self.trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        for model in [self.model] + ([] if self.teacher is None else [self.teacher.model]):
            config = model.config.get_text_config(decoder=True)
            if self.task == "sequence-classification" and config.pad_token_id is None:
                config.pad_token_id = getattr(tokenizer, "pad_token_id", None)

    def teardown(self, stage: str) -> None:
        """Restores the strategy."""
        if self._trainer is not None:
            load_as_before(self.trainer)

    def forward(self, **batch: Tensor) -> Any:  # noqa: ANN401 - a ModelOutput whose class depends on the model
        """Returns the model's output for a batch of its arguments."""
        return self.model(**batch)

    def generate(self, **arguments: Any) -> Tensor:  # noqa: ANN401 - arguments of transformers
        """Returns token ids `[batch, length]` from `model.generate` with these arguments."""
        generated: Tensor = self.model.generate(**arguments)  # type: ignore[operator]
        return generated

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the model's loss, or with a teacher the distillation loss, `[]`."""
        random_state: AbstractContextManager[None] = nullcontext()
        if self._trainer:  # dropout depends on the batch number, so that a resumed run repeats it
            random_state = self.step_random.drawn(self.device, batches_seen(self.trainer), self.global_rank)
        with random_state:
            output = self(**batch, **({} if self.teacher is None else self.teacher.extra_arguments))
        loss: Tensor = output.loss
        if self.teacher is not None:
            self.teacher.match_device(self.model)
            loss, divergence = self.teacher.loss(output, batch)
            self.log("train_kl", divergence)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_train_start(self) -> None:
        """Draws the seed of dropout and checks that all ranks have the same teacher.

        Raises:
            ValueError: If the teacher's weights differ between ranks.
        """
        if self.teacher is not None:
            checksum = torch.tensor(self.teacher.fingerprint, device=self.device)
            if (cast(Tensor, self.all_gather(checksum)) != checksum).any():
                raise ValueError(
                    "distillation: the teacher's weights differ between ranks. Use the same seed on all ranks (seed_everything) "
                    "if weights are randomly initialized, or name the teacher."
                )
        if self.trainer.global_step == 0 and self.trainer.ckpt_path is None:
            self.step_random = StepRandom()
        self.step_random.seed = self.trainer.strategy.broadcast(self.step_random.draw())

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs `val_loss` and the task's metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs `test_loss` and the task's metrics."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns classes, generated token ids, similarities to captions, or logits.

        Generation is limited to `max_new_tokens` of the generation config, by default 128. Without it, a decoder with a fixed
        number of positions generates `max_length` (by default 128) up to that number.
        """
        if self.task in ("seq2seq-lm", "speech-seq2seq"):
            generation, positions = self.model.generation_config, getattr(self.model.config, "max_target_positions", None)
            most = getattr(generation, "max_new_tokens", None)
            limit = {"max_new_tokens": most or MAX_NEW_TOKENS}
            if positions and not most:  # Whisper warns if both limits are set
                limit = {"max_length": min(getattr(generation, "max_length", None) or MAX_NEW_TOKENS, positions)}
            names = (self.model.main_input_name, "attention_mask")
            return self.generate(**{name: batch[name] for name in names if batch.get(name) is not None}, **limit)
        output = self(**batch)
        logits: Tensor = output.logits_per_image if self.task == "feature-extraction" else output.logits
        return logits.argmax(-1) if self.task.endswith("classification") else logits

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        output, labels = self(**batch), batch.get("labels")
        # the loss is a mean over the labels, of which a causal model does not predict the first, or over examples
        if labels is None:
            weight = torch.tensor(len(next(value for value in batch.values() if isinstance(value, Tensor))))
        else:
            weight = ((labels[:, 1:] if self.task == "causal-lm" else labels) != -100).sum()
        self.log(f"{stage}_loss", output.loss, batch_size=int(weight), sync_dist=True)
        for name, metric in cast(dict[str, Metric], self.metrics[stage]).items():
            if isinstance(metric, TokenPerplexity):
                metric.update(output.loss, weight)
            elif isinstance(metric, MeanMetric):
                nearest = output.logits_per_image.argmax(-1)
                metric.update((nearest == torch.arange(len(nearest), device=nearest.device)).float())
            else:
                metric.update(output.logits, labels)
            self.log(f"{stage}_{name}", metric, prog_bar=True, batch_size=int(weight))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Creates AdamW (fused if possible), with warm-up and decay by optimizer step.

        Raises:
            ValueError: If warm-up or decay depend on the length of training, which has no end.
        """
        groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (self.weight_decay, 0.0)]
        fused = self.trainer.precision != "16-mixed"  # gradient scaling of float16 and clipping cannot both act on a fused step
        for parameter in self.parameters():
            if parameter.requires_grad:
                groups[parameter.ndim <= 1]["params"].append(parameter)
                fused = fused and parameter.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.lr, fused=fused)
        total = training_steps(self.trainer)
        if total is None:  # training has no end, so the schedule is that of warm-up
            if self.decay != "constant" or (isinstance(self.warmup, float) and self.warmup > 0):
                raise ValueError(
                    f"decay={self.decay!r} and warmup={self.warmup} require a known training length. Set Trainer(max_steps=...), "
                    "or use decay='constant' with warmup in steps."
                )
            total = int(self.warmup)
        depends_on_length = self.decay != "constant" or isinstance(self.warmup, float)
        if self.trainer.ckpt_path and self._steps not in (None, total) and depends_on_length:
            rank_zero_info(
                f"billhook: the checkpoint's run was set to {self._steps} steps, this run to {total}. The learning rate "
                f"continues as in a run of {total} steps."
            )
        self._steps = total
        kind = {"constant": "constant_with_warmup"}.get(self.decay, self.decay)
        warmup = self.warmup if isinstance(self.warmup, int) else resolve_step(self.warmup, total, "warmup")
        scheduler = transformers.get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}
