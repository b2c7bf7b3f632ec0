"""torch.compile and torch.export treat models that billhook has changed as they treat dense ones."""

import pytest
import torch

from kit.changed import asked, changed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # BLOOM with torch 2.13
]


@pytest.fixture(autouse=True)
def _nothing_is_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.daily("gpt_neox")
@pytest.mark.parametrize("name", ["llama", "bert", "experts", "gpt_neox"])
def test_compiles_into_one_graph_for_texts_of_any_size(name):
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    model = changed(name)
    model.config.use_cache = False
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for rows, length in ((2, 12), (3, 7)):
        inputs = asked(model, rows, length)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-4)
    assert len(made) == 1
