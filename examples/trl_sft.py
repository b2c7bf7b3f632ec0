"""Fine-tuning with LoRA in TRL's SFTTrainer: half of the weights are zero from the start, and stay zero when LoRA merges.

`pip install trl`. Prompts and answers are made of the embedded text: a line of a play, and the next.
"""

import argparse

from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

import billhook as bh
from billhook.assets import model_path, text_files
from billhook.integrations.transformers import Callbacks


def main(steps: int, folder: str) -> None:
    """Fine-tunes a sparse model, and saves it with LoRA merged."""
    set_seed(0)
    model, tokenizer = bh.load("tiny", dtype="float32"), AutoTokenizer.from_pretrained(model_path("tiny"))
    tokenizer.pad_token = tokenizer.eos_token
    text = load_dataset("parquet", data_files=text_files(), cache_dir=f"{folder}/cache")["train"][0]["text"]
    lines = [line for line in text.splitlines() if len(line) > 20][:2000]
    pairs = zip(lines[::2], lines[1::2], strict=True)
    data = Dataset.from_list([{"prompt": line, "completion": f"\n{following}"} for line, following in pairs])
    callbacks = Callbacks(
        [
            bh.WeightPruning(bh.Wanda(), sparsity=0.5, mask_adapters=True, calibration=64),
            bh.Export(f"{folder}/model", tokenizer=tokenizer),
        ]
    )
    args = SFTConfig(f"{folder}/checkpoints", max_steps=steps, learning_rate=1e-3, report_to="none", bf16=False)
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora, callbacks=[callbacks]
    )
    trainer.train()
    print(bh.summary(bh.load(f"{folder}/model")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--folder", default="outputs/trl_sft")
    main(**vars(parser.parse_args()))
