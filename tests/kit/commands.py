"""The quickstart config, and callbacks of a fragment."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


QUICK = """
  --trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.limit_val_batches 1 --trainer.num_sanity_val_steps 0
  --trainer.default_root_dir . --data.block_size 16 --data.batch_size 2
"""


# Lightning says so in each of these short runs
pytestmark = [
    pytest.mark.filterwarnings("ignore:No seed found"),
    pytest.mark.filterwarnings("ignore:`max_epochs` was not set"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    # Lightning 2.6 calls what jsonargparse 4.53 calls deprecated
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended to run from within Python"),
]


def callbacks_in(path: str) -> list[str]:
    config = yaml.safe_load(Path(path).read_text())
    return [c["class_path"].rpartition(".")[2] for c in config["trainer"]["callbacks"]]
