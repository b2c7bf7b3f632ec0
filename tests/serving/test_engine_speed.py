"""`billhook bench --engine llama.cpp`: all files in all rounds, in turning order, and ratios within a round."""

import json
from contextlib import nullcontext

import pytest

from billhook.cli import bench
from billhook.cli.main import main
from kit import serving
from kit.serving import saved

pytestmark = serving.pytestmark


def test_the_table_and_the_figures(tmp_path, capsys, monkeypatch, converter):
    monkeypatch.setattr(bench, "Converter", lambda: nullcontext(converter))
    dense, cut = saved(tmp_path / "dense", "llama"), saved(tmp_path / "cut", "llama", intermediate_size=32)
    out = tmp_path / "out.json"
    line = f"bench {dense} {cut} --engine llama.cpp --contexts [16] --new_tokens 4 --rounds 2 --threads 1 --json {out}"
    main(line.split())
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("llama.cpp, cpu (")
    assert table[2].split()[:6] == ["kind", "context", "model", "GB", "prefill", "tokens/s"]
    assert [line.split()[:3] for line in table[4:]] == [
        [kind, "16", name] for kind in ("F16", "Q4_K_M") for name in ("dense", "cut")
    ]
    rows = json.loads(out.read_text())["rows"]
    assert [len(row["prefill"]) for row in rows] == [len(row["decoding"]) for row in rows] == [2] * 4
    assert [(row["context"], row["new_tokens"]) for row in rows] == [(16, 3)] * 4
    assert rows[0]["bytes"] > rows[1]["bytes"] > rows[3]["bytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--batch_sizes [2]", "batch_sizes=[2] is not supported with engine='llama.cpp'"),
        ("--dtype float16", "dtype='float16' is not supported with engine='llama.cpp'"),
        ("--random", "random=True is not supported with engine='llama.cpp'"),
        ("--rounds 1", "rounds=1 must be a whole number of at least 2"),
        ("--new_tokens 1", "new_tokens=1 must be a whole number of at least 2"),
        ("--contexts [0]", "contexts=0 must be a whole number of at least 1"),
    ],
)
def test_what_does_not_apply_is_refused(options, message):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "tiny", "--engine", "llama.cpp", *options.split()])
    assert message in str(stopped.value.code)
