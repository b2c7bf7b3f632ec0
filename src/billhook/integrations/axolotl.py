"""billhook's callbacks in axolotl.

In its YAML: `plugins: [billhook.integrations.axolotl.Plugin]`, and a list of callbacks as `billhook:`.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from jsonargparse import ArgumentParser
from pydantic import BaseModel
from torch import nn

from billhook.fit.callback import FitCallback
from billhook.integrations.transformers import Callbacks


class Args(BaseModel):
    """Keys that the plugin adds to axolotl's YAML.

    Attributes:
        billhook: Callbacks as in `billhook fit`: each with `class_path`, and `init_args` if any.
    """

    billhook: list[dict[str, Any]] | None = None


class Plugin(BasePlugin):  # type: ignore[misc]
    """Adds callbacks to axolotl's trainer when it is created."""

    def get_input_args(self) -> str:
        """Returns where the added keys are declared."""
        return f"{Args.__module__}.{Args.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: nn.Module) -> list[Callbacks]:  # noqa: ANN401
        """Returns the callbacks of a config, if their arguments are legal."""
        described = getattr(cfg, "billhook", None)
        if not described:
            return []
        parser = ArgumentParser(exit_on_error=False)  # class paths and arguments, as LightningCLI reads them
        parser.add_argument("--billhook", type=list[FitCallback])
        return [Callbacks(parser.instantiate_classes(parser.parse_object({"billhook": _plain(described)})).billhook)]


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Converts axolotl's dictionaries to plain ones."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
