"""On-policy distillation in TRL: the dense model teaches a copy without a third of its channels and half of its blocks.

`pip install trl`. Prompts are lines of the embedded text.
"""

import argparse

from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, set_seed
from trl import DistillationConfig, DistillationTrainer

import billhook as bh
from billhook.assets import model_path, text_files
from billhook.integrations.transformers import Callbacks


def main(steps: int, folder: str) -> None:
    """Removes channels and blocks at the start, distills, and saves the student."""
    set_seed(0)
    teacher, student = bh.load("tiny", dtype="float32"), bh.load("tiny", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny"))
    tokenizer.pad_token = tokenizer.eos_token
    text = load_dataset("parquet", data_files=text_files(), cache_dir=f"{folder}/cache")["train"][0]["text"]
    lines = [line for line in text.splitlines() if len(line) > 20][:512]
    data = Dataset.from_list([{"prompt": line} for line in lines])
    calibration = bh.Calibration("tiny", tokens=64 * 128, length=128)
    callbacks = Callbacks(
        [
            bh.StructuredPruning(bh.Amount(channels=1 / 3), calibration=calibration),
            bh.DepthPruning(blocks=2, calibration=calibration),
            bh.Export(f"{folder}/model", tokenizer=tokenizer),
        ]
    )
    args = DistillationConfig(
        f"{folder}/checkpoints",
        max_steps=steps,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        max_completion_length=32,
        report_to="none",
        bf16=False,
    )
    trainer = DistillationTrainer(
        student, teacher, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[callbacks]
    )
    trainer.train()
    print(bh.summary(bh.load(f"{folder}/model")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", default="outputs/trl_distillation")
    main(**vars(parser.parse_args()))
