"""Proves on a machine with a GPU what `billhook inspect` says of vLLM and SGLang, which was read in their code.

`python benchmarks/serve_gpu.py --model MODEL --out serve_gpu.md` makes a folder of each kind of MODEL (fewer KV heads, query
heads, channels, hidden dimensions and blocks, and layers that differ), has each engine that is installed load it and write
greedily, and has transformers in float32 say the probabilities of the tokens that the engine wrote. Each pair of engine and
folder is a process of its own. `transformers` is the first engine: what it shows in the same dtype is rounding. Without a model
it is the embedded one; without vLLM and SGLang the table has that engine alone, and the status is 1.

Cells say "yes" where log-probabilities of the tokens differ by at most `--tolerance`, with the largest difference and how many
tokens are those that transformers writes in float32; or "no", with the last line of the error. "said" is billhook's verdict.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import billhook as bh
from billhook.assets import model_path
from billhook.importance.baselines import RandomUnits
from billhook.model.meta import read_config
from billhook.serving.engines import verdicts

ENGINES = {"transformers": "transformers", "vLLM": "vllm", "SGLang": "sglang"}
PROMPTS = ["The sea", "Once upon a time there was", "In the beginning", "To be, or not to be"]
KINDS = ("dense", "KV heads", "query heads", "channels", "hidden dimensions", "blocks", "layers differ")


def cut(model, kind):
    """Makes one kind of a model."""
    config = model.config.get_text_config()
    if kind == "KV heads":
        bh.convert_kv_heads(model, max(1, config.num_key_value_heads // 2))
    elif kind != "dense":
        amounts = {
            "query heads": bh.Amount(heads=0.34),
            "channels": bh.Amount(channels=0.25),
            "hidden dimensions": bh.Amount(residual=0.12),
            "blocks": bh.Amount(blocks=1),
            "layers differ": bh.Amount(channels=0.25, first=1),
        }
        importance = RandomUnits() if kind == "blocks" else bh.importance.WeightNorm()
        bh.apply(model, bh.plan(model, importance, amount=amounts[kind]))


def make(options, kind, folder):
    """Writes a folder; returns how it was saved, or why there is none."""
    model = bh.load(options.model)
    try:
        cut(model, kind)
    except ValueError as error:  # a family that cannot lose these
        return f"none: {error}"
    saved = bh.save(model, folder, AutoTokenizer.from_pretrained(model_path(options.model)))
    return saved.family or saved.way


def said(folder):
    """Returns billhook's verdict by engine."""
    config = read_config(folder)
    found = verdicts(config.architectures[0], config, vars(config).get("billhook"))
    return {one.engine: str(one).partition(":")[0] for one in found}


def write_transformers(folder, prompts, options):
    """Writes greedily with plain transformers; returns tokens and their log-probabilities, of each prompt."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=options.dtype).to(device).eval()
    written = [(prompt, greedy(model, prompt, options.tokens)) for prompt in prompts]
    return [(new, scores(model, prompt, new)) for prompt, new in written]


def write_vllm(folder, prompts, options):
    """Writes greedily with vLLM, which was read in 0.33.0."""
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(folder, dtype=options.dtype, gpu_memory_utilization=options.memory, max_model_len=512, enforce_eager=True)
    params = SamplingParams(temperature=0.0, max_tokens=options.tokens, ignore_eos=True, logprobs=0)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], params)
    found = [one.outputs[0] for one in outputs]
    return [
        (list(one.token_ids), [at[token].logprob for token, at in zip(one.token_ids, one.logprobs, strict=True)]) for one in found
    ]


def write_sglang(folder, prompts, options):
    """Writes greedily with SGLang, which was read in 0.5.23."""
    import sglang

    engine = sglang.Engine(model_path=folder, dtype=options.dtype, mem_fraction_static=options.memory, skip_tokenizer_init=True)
    params = {"temperature": 0.0, "max_new_tokens": options.tokens, "ignore_eos": True}
    outputs = engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True)
    engine.shutdown()
    pairs = [[(token, score) for score, token, *_ in one["meta_info"]["output_token_logprobs"]] for one in outputs]
    return [([token for token, _ in one], [score for _, score in one]) for one in pairs]


WRITERS = {"transformers": write_transformers, "vLLM": write_vllm, "SGLang": write_sglang}


def greedy(model, prompt, count):
    """Writes tokens after a prompt."""
    ids = torch.tensor([prompt], device=model.device)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": count, "do_sample": False, "eos_token_id": None}
    return model.generate(ids, **options)[0, len(prompt) :].tolist()


@torch.no_grad()
def scores(model, prompt, new):
    """Computes the log-probabilities of tokens after a prompt."""
    logits = model(torch.tensor([prompt + new], device=model.device)).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1)[torch.arange(len(new)), new].tolist()


def written(engine, folder, prompts, options):
    """Runs an engine in a process of its own; returns what it wrote, or the last line of its error."""
    asked = {"engine": engine, "folder": str(folder), "prompts": prompts, **vars(options)}
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        command = [sys.executable, __file__, "--run", json.dumps(asked | {"answer": answer.name})]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        return json.loads(answer.read())


def compared(found, reference, prompts, tokens, tolerance):
    """Says whether what an engine wrote is what transformers computes in float32."""
    if isinstance(found, str):
        return f"no: {found[:100]}"
    worst = max(
        abs(a - b)
        for (new, own), prompt in zip(found, prompts, strict=True)
        for a, b in zip(own, scores(reference, prompt, new), strict=True)
    )
    pairs = [pair for (new, _), others in zip(found, tokens, strict=True) for pair in zip(new, others, strict=True)]
    return f"{'yes' if worst <= tolerance else 'no'}: {worst:.4f}, {sum(a == b for a, b in pairs)}/{len(pairs)} tokens"


def row(options, kind, engines, prompts):
    """Makes the cells of one kind."""
    with tempfile.TemporaryDirectory() as place:
        folder = f"{place}/model"
        cells = [kind, make(options, kind, folder)]
        if not Path(folder).exists():
            return cells + ["-", "-"] * len(engines)
        reference, words = bh.load(folder, "float32"), said(folder)
        tokens = [greedy(reference, prompt, options.tokens) for prompt in prompts]
        for engine in engines:
            found = written(engine, folder, prompts, options)
            cells += [compared(found, reference, prompts, tokens, options.tolerance), words[engine]]
        return cells


def main():
    """Runs all, or with `--run` one engine on one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a folder, a hub name, or tiny")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--tokens", type=int, default=24, help="tokens that are written after each prompt")
    parser.add_argument(
        "--tolerance", type=float, default=0.1, help="the largest difference of log-probabilities that is rounding"
    )
    parser.add_argument("--memory", type=float, default=0.5, help="the share of the GPU's memory that an engine may take")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--out", help="a file for the table")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        asked = argparse.Namespace(**json.loads(options.run))
        Path(asked.answer).write_text(json.dumps(WRITERS[asked.engine](asked.folder, asked.prompts, asked)))
        return
    engines = [name for name, package in ENGINES.items() if importlib.util.find_spec(package)]
    tokenizer = AutoTokenizer.from_pretrained(model_path(options.model))
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    rows = [[options.model, "saved", *(word for engine in engines for word in (engine, "said"))]]
    rows.append(["---"] * len(rows[0]))
    for kind in options.kinds:
        rows.append(row(options, kind, engines, prompts))
        print(*rows[-1], sep=" | ", flush=True)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    print(f"\n{table}")
    if options.out:
        Path(options.out).write_text(f"{table}\n")
    if missing := [name for name in ENGINES if name not in engines]:
        sys.exit(f"not installed, so not asked: {', '.join(missing)}; on a machine with a GPU, pip install vllm sglang")


if __name__ == "__main__":
    main()
