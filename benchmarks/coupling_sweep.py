"""Traces every architecture that the installed transformers can build from a small config, and asks the oracle about each.

`python benchmarks/coupling_sweep.py --out FILE` writes the table of docs/evidence/tracing.md; model types restrict it.
"""

import argparse
import collections
import signal
import sys
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from oracle import answer, check, randomise
from small_configs import architectures, build, has_experts, small_config

from billhook.model.inputs import make_inputs
from billhook.tracing.trace import trace

NAMES = ("clean", "partly untraceable", "not traced", "not built")
NOT_PRUNED = ("vocab", "label", "fixed", "position")
SECONDS = 60


@dataclass
class Result:
    """What came out for one architecture."""

    auto: str
    model_type: str
    state: str
    reason: str = ""
    groups: int = 0
    true: int = 0
    flagged: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    trouble: str = ""
    seconds: float = 0.0


def sweep_one(auto, model_type, config_class, model_class, oracle=True):
    """Builds, traces and checks one architecture."""
    result = Result(auto, model_type, "not built")
    try:
        config = small_config(config_class)
        model = build(config, model_class, "batched_mm" if has_experts(config) else "eager")
        inputs = make_inputs(model)
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        try:  # not every class of experts has the batched implementation
            model = build(small_config(config_class), model_class)
            inputs = make_inputs(model)
            with torch.no_grad():
                model(**inputs)
        except Exception:
            result.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:110]}"
            return result
    start = time.perf_counter()
    try:
        structure = trace(model)
    except ValueError as error:
        result.state, result.reason = "not traced", " ".join(str(error).split())[:200]
        return result
    result.seconds = time.perf_counter() - start
    result.state = "partly untraceable" if structure.opaque else "clean"
    result.reason = "; ".join(list(structure.opaque)[:2])[:200]
    if oracle:
        ask(result, model, structure, inputs)
    return result


def ask(result, model, structure, inputs):
    """Permutes the units of each group in the real model, in float64 where its code allows that."""
    groups = [group for group in structure.groups if group.kind not in NOT_PRUNED]
    for dtype in (torch.float64, torch.float32):
        model = model.to(dtype)
        randomise(model)
        given = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
        try:
            findings = list(check(model, structure, partial(_answer, model, given), groups))
        except Exception as error:  # whatever a model's own code raises
            trouble = f"the oracle does not run: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
            continue
        for finding in findings:
            group = finding.group
            text = f"{group.kind}:{group.size} {group.members[0].name} ({finding.error:.1e}; {', '.join(group.flags)})"
            result.groups += 1
            if finding.holds:
                result.true += 1
            else:
                (result.flagged if group.reason else result.wrong).append(text)
        return
    result.trouble = trouble


def _answer(model, inputs):
    torch.manual_seed(0)  # some draw noise or which patches they see
    return answer(model(**inputs))


COLUMNS = ("auto class", *NAMES, "groups checked", "true", "not prunable", "wrong", "not checked")


def table(results):
    """The counts by auto class, and what was refused with its reason."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    by = collections.defaultdict(list)
    for result in results:
        by[result.auto].append(result)
    for auto, own in by.items():
        states = collections.Counter(result.state for result in own)
        counts = [
            sum(n) for n in zip(*((r.groups, r.true, len(r.flagged), len(r.wrong), bool(r.trouble)) for r in own), strict=True)
        ]
        lines.append(f"| {auto} | " + " | ".join(str(n) for n in [*(states[name] for name in NAMES), *counts]) + " |")
    return "\n".join(lines)


def main():
    """Sweeps, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types, all by default")
    parser.add_argument("--auto", help="one auto class only")
    parser.add_argument("--no-oracle", action="store_true")
    parser.add_argument("--all", action="store_true", help="print the clean ones too")
    parser.add_argument("--out", type=Path, help="where the table is written")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()

    def ring(*_):
        raise TimeoutError(f"longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, ring)
    results = []
    for auto, model_type, config_class, model_class in architectures():
        if (arguments.names and model_type not in arguments.names) or (arguments.auto and auto != arguments.auto):
            continue
        signal.alarm(SECONDS)
        try:
            result = sweep_one(auto, model_type, config_class, model_class, not arguments.no_oracle)
        except TimeoutError as error:
            result = Result(auto, model_type, "not built", str(error))
        signal.alarm(0)
        results.append(result)
        if arguments.all or result.state != "clean" or result.wrong or result.trouble:
            print(f"{auto[9:]:20} {model_type:28} {result.state:14} {result.true}/{result.groups} {result.reason}", flush=True)
            for text in result.wrong + [result.trouble] * bool(result.trouble):
                print("      WRONG" if text in result.wrong else "      NOT ASKED", text, flush=True)
    print(table(results))
    if arguments.out:
        told = [r for r in results if r.state != "clean" or r.trouble]
        rows = "\n".join(f"| {r.auto} | {r.model_type} | {r.state} | {(r.reason + r.trouble).replace('|', '/')} |" for r in told)
        arguments.out.write_text(f"{table(results)}\n\n| auto class | model type | state | reason |\n|---|---|---|---|\n{rows}\n")


if __name__ == "__main__":
    sys.exit(main())
