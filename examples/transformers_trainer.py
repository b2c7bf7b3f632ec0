"""The embedded Llama in transformers' Trainer: fewer channels at the start, then fewer KV heads during training."""

import argparse

from datasets import load_dataset
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments, set_seed

import billhook as bh
from billhook.assets import model_path, text_files
from billhook.integrations.transformers import Callbacks


def main(steps: int, folder: str) -> None:
    """Trains, changes the model on the way, and saves it."""
    set_seed(0)
    model, tokenizer = bh.load("tiny", dtype="float32"), AutoTokenizer.from_pretrained(model_path("tiny"))
    tokenizer.pad_token = tokenizer.eos_token

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = tokenizer("\n".join(rows["text"]))["input_ids"]
        return {"input_ids": [ids[start : start + 128] for start in range(0, len(ids) - 127, 128)]}

    texts = load_dataset("parquet", data_files=text_files(), cache_dir=f"{folder}/cache")
    data = texts.map(encode, batched=True, remove_columns=texts["train"].column_names)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    seen = [collate([data["train"][number]]) for number in range(32)]
    unseen = [collate([data["validation"][number]]) for number in range(16)]
    callbacks = Callbacks(
        [
            bh.StructuredPruning(bh.Amount(channels=0.25), calibration=seen),  # before the Trainer wraps the model
            bh.KVHeadConversion(num_key_value_heads=2, at=0.2, method="svd", calibration=seen),
            bh.Export(f"{folder}/model"),
            bh.Report(f"{folder}/report.png"),
        ],
        validation=unseen,
    )
    args = TrainingArguments(
        f"{folder}/checkpoints",
        max_steps=steps,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        eval_strategy="steps",
        eval_steps=max(1, steps // 5),
        report_to="none",
    )
    evaluated = data["validation"].select(range(64))
    trainer = Trainer(
        model,
        args,
        collate,
        train_dataset=data["train"],
        eval_dataset=evaluated,
        processing_class=tokenizer,
        callbacks=[callbacks],
    )
    trainer.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", default="outputs/transformers_trainer")
    main(**vars(parser.parse_args()))
