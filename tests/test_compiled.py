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
@pytest.mark.parametrize("name", ["llama", "bert", "experts", "gpt_neox", "bloom"])
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


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_exported_programs_answer_texts_of_other_sizes(name):
    """Of models of which one layer hands heads out."""
    model = changed(name)
    model.config.use_cache = False
    inputs = asked(model)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, free)).module()
    for rows, length in ((3, 7), (1, 20)):
        inputs = asked(model, rows, length)
        with torch.no_grad():
            torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-4)
