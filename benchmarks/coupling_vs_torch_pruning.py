"""What `trace` and torch-pruning's DependencyGraph each say belongs together, and which of them is right when the model is run.

`pip install torch-pruning`; `python benchmarks/coupling_vs_torch_pruning.py --out comparison.md`; names of FAMILIES restrict it.
SmolLM2's config is read from the folder that BILLHOOK_MODELS names, or else from the hub.

Both get the same small model of two layers: random weights (norms and biases too), float64, eager attention, in which autograd
sees the repetition of KV heads. torch-pruning is used as documented: `build_dependency` with its default treatment of unwrapped
parameters, then `get_pruning_group(layer, fn, idxs)`. It knows no heads (`num_heads` belongs to its high-level pruner, which
picks indices by it), so it is told the indices: all of unit 0 in the layer that it is asked from. Its answer and our group, for
the same unit, are compared as sets of (parameter, dimension, indices), in which tied weights are one parameter
(they are tried untied, too, where torch-pruning is wrong otherwise: it treats them as two).

A claim is true if units 0 and 1 can change places in exactly the claimed members and the model answers as before. Then unit 0 is
taken out of a copy, as claimed: whether the model still runs (nothing but the layers is adapted: no `num_heads`), and answers as
with the claimed entries set to zero, which is not asked where a norm, a softmax over experts or a rotary embedding sees them.
"""

import argparse
import copy
import gc
import multiprocessing
import os
import time
import warnings
from collections import defaultdict
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch_pruning as tp
import transformers
from oracle import TOLERANCE, answer, difference, randomise
from small_configs import architectures, build, small_config
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from billhook.model.cache import clear_cache
from billhook.model.inputs import make_inputs
from billhook.tracing.trace import trace

CAUSAL = "AutoModelForCausalLM"
FAMILIES = {
    "Llama": (CAUSAL, "llama", {"num_key_value_heads": 6}),
    "Llama GQA": (CAUSAL, "llama", {}),
    "GPT-2": (CAUSAL, "gpt2", {}),
    "GPT-2, Conv1D taught": (CAUSAL, "gpt2", {}),
    "GPT-NeoX": (CAUSAL, "gpt_neox", {}),
    "BLOOM": (CAUSAL, "bloom", {}),
    "OPT": (CAUSAL, "opt", {}),
    "Phi-3": (CAUSAL, "phi3", {}),
    "Mixtral": (CAUSAL, "mixtral", {}),
    "Mixtral, dims taught": (CAUSAL, "mixtral", {}),
    "BERT": ("AutoModelForMaskedLM", "bert", {}),
    "T5": ("AutoModelForSeq2SeqLM", "t5", {}),
    "ViT": ("AutoModelForImageClassification", "vit", {}),
}
SMOLLM2 = f"{os.environ['BILLHOOK_MODELS']}/smollm2" if "BILLHOOK_MODELS" in os.environ else "HuggingFaceTB/SmolLM2-135M-Instruct"
REAL = ["gpt2-small", "SmolLM2-135M"]


class Conv1DPruner(tp.BasePruningFunc):
    """What torch-pruning must be taught for GPT-2: a linear layer with the transposed weight."""

    def prune_out_channels(self, layer, idxs):
        """Takes columns."""
        keep = [i for i in range(layer.nf) if i not in set(idxs)]
        layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 1)
        layer.bias = self._prune_parameter_and_grad(layer.bias, keep, 0)
        layer.nf = len(keep)
        return layer

    def prune_in_channels(self, layer, idxs):
        """Takes rows."""
        keep = [i for i in range(layer.nx) if i not in set(idxs)]
        layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 0)
        layer.nx = len(keep)
        return layer

    def get_out_channels(self, layer):
        """How many columns."""
        return layer.nf

    def get_in_channels(self, layer):
        """How many rows."""
        return layer.nx


def make(name):
    """The small model of a family, or a real-sized one with random weights."""
    if name in REAL:
        config = transformers.GPT2Config() if name == "gpt2-small" else AutoConfig.from_pretrained(SMOLLM2)
        config._attn_implementation = "eager"
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    auto, kind, values = FAMILIES[name]
    config_class, model_class = next((c, m) for a, k, c, m in architectures() if (a, k) == (auto, kind))
    config = small_config(config_class)
    for key, value in values.items():
        setattr(config, key, value)
    config._attn_implementation = "eager"
    return build(config, model_class, "batched_mm")


def their_graph(name, model, inputs):
    """torch-pruning's graph of a model."""
    taught = {Conv1D: Conv1DPruner()} if "Conv1D taught" in name else None
    dims = {".gate_up_proj": 0, ".down_proj": 0, "gate.weight": 0} if "dims taught" in name else {}
    unwrapped = [(p, d) for n, p in model.named_parameters() for end, d in dims.items() if n.endswith(end)]
    return tp.DependencyGraph().build_dependency(
        model, inputs, output_transform=answer, customized_pruners=taught, unwrapped_parameters=unwrapped or None, verbose=False
    )


def places(graph, model, group, tied):
    """A group of theirs as {(parameter, dimension): indices}."""
    names, found = {module: name for name, module in model.named_modules()}, defaultdict(set)
    dims = {id(p): d for p, d in graph.unwrapped_parameters}
    parameters = {id(p): name for name, p in model.named_parameters()}
    for dep, idxs in group:
        layer, out = dep.target.module, graph.is_out_channel_pruning_fn(dep.handler)
        if isinstance(layer, nn.Parameter):
            found[parameters[id(layer)], dims[id(layer)] % layer.dim()] |= set(idxs)
        elif layer in names and list(layer.parameters(recurse=False)):
            name, swapped = names[layer], isinstance(layer, nn.Embedding | Conv1D)
            weight = tied.get(f"{name}.weight", f"{name}.weight")
            found[weight, int(out == swapped) if layer.weight.dim() > 1 else 0] |= set(idxs)
            if out and getattr(layer, "bias", None) is not None:
                found[tied.get(f"{name}.bias", f"{name}.bias"), 0] |= set(idxs)
    return {place: sorted(idxs) for place, idxs in found.items()}


def ours(group, unit):
    """A group of ours as {(parameter, dimension): indices}."""
    return {(m.name, m.dim): group.positions(m, [unit]).tolist() for m in group.members}


def root(graph, model, name, dim):
    """The layer, or the bare parameter, and the function with which torch-pruning is asked for a dimension of a parameter."""
    parameter = model.get_parameter(name)
    layers = [m for m in model.modules() if any(p is parameter for p in m.parameters(recurse=False))]  # several, if it is tied
    layer = next((m for m in layers if m in graph.module2node), layers[0])
    if graph.get_pruner_of_module(layer) is None or layer not in graph.module2node:
        dims = {id(p): d for p, d in graph.unwrapped_parameters}
        if parameter not in graph.module2node or dims[id(parameter)] % parameter.dim() != dim:
            return None
        return parameter, graph.get_pruner_of_module(parameter).prune_out_channels
    pruner = graph.get_pruner_of_module(layer)
    out = dim == int(isinstance(layer, nn.Embedding | Conv1D))
    return layer, pruner.prune_out_channels if out else pruner.prune_in_channels


def questions(structure):
    """(group, who is asked): groups of the first attention and feed-forward block, the residual stream, the experts."""
    one = structure.attention[0]
    by_leaf = {group.leaf: group for group in structure.groups}
    roles = [("q", one.q), ("k", one.k), ("v", one.v), ("o", one.o)]
    for leaf in dict.fromkeys([*one.heads, *one.query_key, *one.value]):
        for role, parts in roles:
            yield by_leaf.get(leaf), role, parts[0].name, parts[0].dim
    if structure.feed_forward:
        block = structure.feed_forward[0]
        for role, parts in (("gate", block.gate), ("up", block.up), ("down", block.down)):
            if parts:
                yield by_leaf[block.channel], role, parts[0].name, parts[0].dim
    for group in [*structure.of_kind("residual")[:1], *structure.of_kind("expert")[:1]]:
        member = next(m for m in group.members if not m.buffer)
        yield group, member.name.split(".")[-2], member.name, member.dim


def exchanged(model, run, first, second):
    """How much the answer changes when the entries of two claims change places, or why they cannot."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    if any(
        min(idxs) < 0 or max(idxs) >= tensors[name].shape[dim] for one in (first, second) for (name, dim), idxs in one.items()
    ):
        return "beyond the dimension"
    if {k: len(v) for k, v in first.items()} != {k: len(v) for k, v in second.items()}:
        return "not of equal size"
    if any(set(first[k]) & set(second[k]) for k in first):
        return "they overlap"
    saved = {name: tensors[name].data for name, _ in first}
    base = run(model)
    for place, idxs in first.items():
        name, dim = place
        order = np.arange(tensors[name].shape[dim])
        order[idxs], order[second[place]] = second[place], idxs
        tensors[name].data = tensors[name].data.index_select(dim, torch.from_numpy(order))
    out = run(model)
    for name, data in saved.items():
        tensors[name].data = data
    return difference(out, base)


def untied(model, tied):
    """A copy in which every tied weight is a parameter of its own."""
    loose = copy.deepcopy(model)
    for name in tied:
        module, _, own = name.rpartition(".")
        setattr(loose.get_submodule(module), own, nn.Parameter(loose.get_parameter(name).detach().clone()))
    return loose


def cut(model, claimed):
    """Takes the claimed entries out of a model's parameters and buffers."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for (name, dim), idxs in claimed.items():
        keep = np.setdiff1d(np.arange(tensors[name].shape[dim]), idxs)
        tensors[name].data = tensors[name].data.index_select(dim, torch.from_numpy(keep))
    for module in model.modules():
        if isinstance(module, Conv1D):
            module.nx, module.nf = module.weight.shape
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(module.weight.shape)


def consequences(model, run, group, claimed, other, prune):
    """The cells of one claim: its size, whether it is true, whether the model runs without it, and as if it were zero."""
    claim = exchanged(model, run, claimed, other)
    said = f"no ({claim})" if isinstance(claim, str) else "yes" if holds(claim) else f"no ({claim:.0e})"
    sliced, masked = copy.deepcopy(model), copy.deepcopy(model)
    size = f"{len(claimed)} / {sum(map(len, claimed.values()))}"
    seen = {"normed", "topk", "const"} & group.flags.keys()
    try:
        prune(sliced)
        out = run(sliced)
    except Exception as error:  # whatever comes of a wrong group
        return claim, [size, said, f"no: {type(error).__name__}", ""]
    tensors = dict([*masked.named_parameters(), *masked.named_buffers()])
    for (name, dim), idxs in claimed.items():
        tensors[name].data.index_fill_(dim, torch.tensor(idxs), 0.0)
    base = run(masked)
    error = difference(out, base) if out.shape == base.shape else float("inf")
    return claim, [size, said, "yes", "" if seen else "yes" if error < TOLERANCE else f"no ({error:.0e})"]


def unlike(mine, other):
    """What they miss and have too much."""
    missed, extra = [k for k in mine if k not in other], [k for k in other if k not in mine]
    differ = [k for k in mine if k in other and mine[k] != other[k]]
    texts = []
    for label, keys in (("lacks", missed), ("adds", extra), ("differs in", differ)):
        if keys:
            texts.append(f"{label} {short(keys[0])}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else ""))
    return "; ".join(texts)


def short(place):
    """A parameter's last names and the dimension."""
    return f"{'.'.join(place[0].split('.')[-2:])}[{place[1]}]"


def compare(name):
    """The rows of one family."""
    model = make(name).double()
    randomise(model)
    inputs = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in make_inputs(model).items()
    }

    def run(one):
        with torch.no_grad():
            return answer(one(**inputs))

    structure = trace(model)
    graph = their_graph(name, model, inputs)
    rows = defaultdict(list)
    for group, role, *place in questions(structure):
        place = tuple(place)
        if group is None or place not in ours(group, 0):
            continue
        mine = [ours(group, unit) for unit in (0, 1)]
        true, cells = consequences(model, run, group, *mine, lambda model, claim=mine[0]: cut(model, claim))
        claim, right, theirs = None, "billhook" if holds(true) else "neither", ["cannot be asked", "", "", "", ""]
        if (asked := root(graph, model, *place)) is not None:
            try:
                groups = [graph.get_pruning_group(*asked, one[place]) for one in mine]
                answers = [places(graph, model, one, structure.tied) for one in groups]
            except Exception as error:  # whatever its mappings raise
                theirs[0] = f"raises {type(error).__name__}"
            else:

                def prune(model, place=place, idxs=mine[0][place]):
                    graph = their_graph(name, model, inputs)
                    graph.get_pruning_group(*root(graph, model, *place), idxs).prune(record_history=False)

                claim, theirs = consequences(model, run, group, *answers, prune)
                theirs.append(unlike(mine[0], answers[0]))
                if not holds(claim) and structure.tied:
                    loose, raw = untied(model, structure.tied), [places(graph, model, one, {}) for one in groups]
                    right += ", torch-pruning if untied" if holds(exchanged(loose, run, *raw)) else ""
        if holds(claim):
            right = "torch-pruning" if not holds(true) else "both" if not theirs[-1] else "both, torch-pruning's is larger"
        label = f"{group.kind}:{group.size}{' (not prunable)' if group.reason else ''}"
        rows[(label, *cells, *theirs, right)].append(role)
    for (label, *cells), roles in rows.items():
        yield [name, f"{label} from {', '.join(roles)}", *cells]


def holds(error):
    """Whether an exchange was possible and left the answer as it was."""
    return isinstance(error, float) and error < TOLERANCE


def resident(peak=False):
    """Megabytes of resident memory, now or at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) / 1024


def tool(name, who):
    """Builds one side's answer in full: every group."""
    model = make(name)
    inputs = make_inputs(model)
    with torch.no_grad():
        model(**inputs)
    if who == "ours":
        return lambda: trace(model).groups
    return lambda: list(their_graph(name, model, inputs).get_all_groups())


def grown(name, who, pipe):
    """Sends by how many megabytes a fresh process grows over one side's work, after it has been done for another model."""
    quiet()
    tool("OPT" if name != "OPT" else "BERT", who)()
    work = tool(name, who)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident()
    work()
    pipe.send(resident(peak=True) - before)


def cost(name, repetitions):
    """One row of times and memory."""
    memory, times = {}, defaultdict(list)
    for who in ("ours", "theirs"):
        receiver, sender = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=grown, args=(name, who, sender))
        process.start()
        memory[who] = receiver.recv()
        process.join()
    work = {who: tool(name, who) for who in memory}
    for i in range(repetitions + 1):
        for who, do in work.items():
            clear_cache()
            start = time.process_time()
            do()
            times[who] += [time.process_time() - start] if i else []
    ratio = median(b / a for a, b in zip(times["ours"], times["theirs"], strict=True))
    return [
        name,
        *(f"{1000 * median(times[who]):.0f}" for who in work),
        f"{ratio:.1f}",
        *(f"{memory[who]:.0f}" for who in work),
    ]


def quiet():
    """No warnings."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()


def table(header, rows):
    """Rows as Markdown, printed as they come."""
    lines = [f"| {header} |", "|" + "---|" * (header.count("|") + 1)]
    print("\n".join(lines))
    for row in rows:
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main():
    """Compares, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join([*FAMILIES, *REAL])}; all by default")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--no-cost", action="store_true", help="neither times nor memory")
    parser.add_argument("--out", type=Path, help="where the tables are written")
    arguments = parser.parse_args()
    quiet()
    names = arguments.names or [*FAMILIES, *REAL]
    checks = "true | runs | as zeroed"
    header = f"family | group | billhook: members / indices | {checks} | torch-pruning | {checks} | difference | right"
    texts = [table(header, (row for name in names if name in FAMILIES for row in compare(name)))]
    if not arguments.no_cost:
        header = "model | billhook ms | torch-pruning ms | ratio | billhook MB | torch-pruning MB"
        texts.append(table(header, (cost(name, arguments.repetitions) for name in names)))
    if arguments.out:
        arguments.out.write_text("\n\n".join(texts) + "\n")


if __name__ == "__main__":
    main()
