"""Config files that drop the callbacks of those before them, or stand on no base, say so."""

import pytest

from billhook.cli.main import main

FIRST = "trainer:\n  callbacks+:\n    - class_path: billhook.WeightPruning\n"
ADDS = "trainer:\n  callbacks+:\n    - class_path: billhook.Export\n"
LORA = "trainer:\n  callbacks+: []\nmodel:\n  lora:\n    r: 8\n"
GIVEN = ["--model.model", "tiny", "--data.data", "tiny"]
DROPS = "trainer:\n  callbacks:\n    - class_path: billhook.Export\n"


@pytest.mark.parametrize(("later", "dropped"), [(ADDS, None), (DROPS, "WeightPruning"), ("trainer:\n  max_steps: 1\n", None)])
def test_a_list_in_a_later_file_is_told_to_drop(tmp_path, monkeypatch, capsys, later, dropped):
    ran = []
    monkeypatch.setattr("billhook.cli.fit.run_lightning", ran.append)
    for name, text in {"first.yaml": FIRST, "later.yaml": later}.items():
        (tmp_path / name).write_text(text)
    main(["fit", "--config", str(tmp_path / "first.yaml"), f"--config={tmp_path / 'later.yaml'}", *GIVEN])
    said = capsys.readouterr().err
    assert len(ran) == 1
    assert said == (
        ""
        if dropped is None
        else f"billhook fit: warning: {tmp_path / 'later.yaml'} drops the callbacks of earlier configs ({dropped}). "
        "To add to them, use `callbacks+:`.\n"
    )


MODELS = ("{model: tiny}", "my.Module", "{class_path: my.Module}", "{init_args: {model: tiny}}")
BASES = [f"model: {model}\ndata: {{data: tiny}}" for model in MODELS] + ["- 1"]
NEITHER, DATA = "no model and no data", "no data"
GIVE = {NEITHER: "--model.model and --data.data", DATA: "--data.data"}


@pytest.mark.parametrize(
    ("words", "named", "missing"),
    [
        (["--config", "adds.yaml"], "adds.yaml chooses", NEITHER),
        (["--config=recipe:wanda"], "recipe:wanda chooses", NEITHER),
        (
            ["-c", "lora.yaml", "--config", "adds.yaml", "--model.lr", "1"],
            "lora.yaml and adds.yaml choose",
            NEITHER,
        ),
        (["--config", "adds.yaml", "--model.model", "tiny"], "adds.yaml chooses", DATA),
        (["--config", "adds.yaml", "--model=my.Module"], "adds.yaml chooses", DATA),
        (["--config", "recipe:base", "--config", "adds.yaml"], None, None),
        (["--config", "adds.yaml", "--model", "my.Module", "--data.data", "a.txt"], None, None),
        (["--config", "adds.yaml", "--config", "nowhere.yaml"], None, None),  # the parser says what it is
        ([], None, None),
        *((["--config", "adds.yaml", "--config", f"base{number}.yaml"], None, None) for number in range(len(BASES))),
    ],
)
def test_fragments_without_a_base_are_told_what_to_put_before(tmp_path, monkeypatch, capsys, words, named, missing):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("billhook.cli.fit.run_lightning", lambda words: None)
    for name, text in {"adds": ADDS, "lora": LORA, **{f"base{number}": text for number, text in enumerate(BASES)}}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    main(["fit", *words])
    said = capsys.readouterr().err
    if named is None:
        assert said == ""
    else:
        base = f"Start with a base, such as `--config recipe:base --config {named.split()[0]}`, or pass {GIVE[missing]}."
        assert said == f"billhook fit: warning: {named} {missing}, so that the packaged default is used. {base}\n"


def test_an_option_that_the_last_callback_does_not_have_is_refused(tmp_path, capsys):
    for name, text in {"first.yaml": FIRST, "adds.yaml": ADDS}.items():
        (tmp_path / name).write_text(text)
    files = ["--config", str(tmp_path / "first.yaml"), "--config", str(tmp_path / "adds.yaml")]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *files, *GIVEN, "--trainer.callbacks.sparsity", "0.6"])
    assert "billhook.Export has no argument 'sparsity'. Arguments: folder" in f"{stopped.value.code}{capsys.readouterr().err}"
