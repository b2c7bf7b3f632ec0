import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        yield


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    from fits import write_text

    return write_text(tmp_path_factory.mktemp("text"))
