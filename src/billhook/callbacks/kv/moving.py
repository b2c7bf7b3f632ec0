"""The heads of a group move towards each other in a fit, before they are cut."""

import lightning.pytorch as pl

from billhook.callbacks.kv.preparation import Preparation
from billhook.fit.events.shape_event import unwrapped
from billhook.fit.ranks import check_agreed, together
from billhook.kv_heads.plan import KVHeadPlan
from billhook.kv_heads.pooling import approach
from billhook.model.find import find_transformer
from billhook.model.surgery import take


class Moving:
    """How far heads have moved.

    Attributes:
        moved: The last step after which they moved; -1 for none.
        turned: The stages whose heads have been put in one basis.
        path: A plan of what they move towards, while it is that of the model.
    """

    def __init__(self) -> None:
        self.moved, self.turned = -1, list[int]()
        self.path: KVHeadPlan | None = None

    def move(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, preparation: Preparation, stage: int, share: float
    ) -> None:
        """Moves the heads that a stage is to cut along `path`, by a share of the remaining way, once they lie in one basis."""
        model = find_transformer(pl_module)
        if self.path is None:
            return
        if preparation.method.turns and stage not in self.turned:
            groups = dict.fromkeys(self.path.layers, self.path.after)
            with unwrapped(trainer), together(trainer, "KVHeadConversion"):
                weights = preparation.turned(trainer, pl_module, groups)
                check_agreed(trainer, "KVHeadConversion", "how heads are turned", weights)
                take(model, weights, trainer.optimizers)
            self.turned.append(stage)
        approach(model, self.path.parameters, share, preparation.method.pool)
        self.moved = trainer.global_step

    def fits(self, pl_module: pl.LightningModule) -> bool:
        """Returns whether the model still has the heads that `path` is of."""
        if self.path is None:
            return False
        sizes = {name: parameter.shape for name, parameter in find_transformer(pl_module).named_parameters()}
        held = self.path.parameters.items()
        return all(name in sizes and sizes[name][pooled.dim] == len(pooled.index) for name, pooled in held)
