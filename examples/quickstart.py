"""The quickstart in Python: the embedded Llama from 8 KV heads to 4, 2 and 1 in the middle of a fit."""

import argparse

import lightning.pytorch as pl
from transformers import AutoModelForCausalLM, AutoTokenizer

import billhook as bh


def main(steps: int, folder: str) -> None:
    """Trains, converts on the way, saves, and lets what was saved speak."""
    pl.seed_everything(0)
    trainer = pl.Trainer(
        max_steps=steps,
        val_check_interval=max(1, steps // 10),
        check_val_every_n_epoch=None,
        limit_val_batches=12,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[
            bh.KVHeadConversion(num_key_value_heads=[4, 2, 1], at=[0.05, 0.2, 0.4]),
            bh.Export(f"{folder}/model"),
            bh.Report(f"{folder}/report.png"),
        ],
    )
    trainer.fit(bh.TransformerModule("tiny", lr=2e-3, warmup=40), bh.TextDataModule("tiny"))

    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
    inputs = tokenizer("MACBETH.\nTo-morrow, and", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60, do_sample=True, top_k=20)[0]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", default="outputs/quickstart_python")
    main(**vars(parser.parse_args()))
