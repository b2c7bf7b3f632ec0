"""A saved folder is pushed to a stand-in for the Hub by the real client, and arrives whole."""

import re

import huggingface_hub
import pytest

import billhook as bh
from billhook.checkpoints.push import NotPushed, push
from billhook.cli.main import main
from kit.families import llama
from kit.hub import hub, to_hub
from kit.published import record_of

# huggingface_hub, of httpx
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")


@pytest.fixture
def held(monkeypatch):
    with hub() as held:
        to_hub(monkeypatch, held)
        yield held


@pytest.fixture
def folder(tmp_path):
    model = llama()
    model.config.name_or_path = str(tmp_path / "dense")
    bh.save(model, tmp_path / "small", record={"steps": 1, "data": str(tmp_path / "text.txt")})
    return tmp_path / "small"


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_files_arrive(held, folder):
    (folder / "more").mkdir()
    (folder / "more" / "notes.txt").write_text("of one's own")
    record_of(folder)
    before = files_in(folder)
    assert push(folder, "someone/small") == f"{held.url}/someone/small/commit/1"
    assert held.repos == {"someone/small": {"main": before}}
    assert {"README.md", "billhook.json", "config.json", "model.safetensors", "more/notes.txt"} <= before.keys()
    assert [*held.large.values()] == [before["model.safetensors"]]
    assert held.private == {"someone/small": False}
    assert files_in(folder) == before


def test_again_privately_and_to_a_branch(held, folder):
    push(folder, "someone/small", private=True)
    assert held.private == {"someone/small": True}
    (folder / "README.md").write_text("# Another")
    push(folder, "someone/small", private=True, revision="later")
    assert held.repos["someone/small"]["later"]["README.md"] == b"# Another"
    assert held.repos["someone/small"]["main"]["README.md"] != b"# Another"


def test_what_must_be_private_does_not_go_where_all_can_read_it(held, folder):
    push(folder, "someone/small")
    (folder / "README.md").write_text("# A secret")
    with pytest.raises(NotPushed, match="exists and is public.*To retry, run `billhook push .*small someone/small --private`"):
        push(folder, "someone/small", private=True)
    assert held.repos["someone/small"]["main"]["README.md"] != b"# A secret"


@pytest.mark.daily("/create", "/commit/")
@pytest.mark.parametrize("part", ["/create", "/preupload", "/objects/batch", "/large/", "/commit/"])
def test_what_the_hub_refuses_is_still_in_the_folder(held, folder, part):
    before, held.refuse = files_in(folder), part
    again = re.escape(f"To retry, run `billhook push {folder} someone/small --revision x`")
    with pytest.raises(NotPushed, match=f"was not pushed to someone/small: .*{again}"):
        push(folder, "someone/small", revision="x")
    assert files_in(folder) == before
    held.refuse = "\0"
    push(folder, "someone/small", revision="x")
    assert held.repos["someone/small"]["x"] == before


@pytest.mark.daily("a/b/c", "someone/x.git", "3")
@pytest.mark.parametrize("name", ["small", "a/b/c", "someone/a model", "someone/", "someone/x.git", "../small", 3])
def test_names_that_are_none(held, folder, name):
    with pytest.raises(ValueError, match=r"name=.* must be the name of a Hub repository, such as 'user/name'"):
        push(folder, name)
    assert held.asked == []


def test_without_a_token_or_offline_nothing_is_asked(held, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        push(folder, "someone/small")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(folder / "none"))
    with pytest.raises(ValueError, match="name='someone/small': no Hub token on this machine. Run `hf auth login`"):
        push(folder, "someone/small")
    assert held.asked == []


def test_only_what_was_saved_and_verified(held, folder, tmp_path):
    llama().save_pretrained(tmp_path / "plain")
    for other in (tmp_path / "plain", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"has no valid billhook.json. Only folders that billhook saved"):
            push(other, "someone/small")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors is missing"):
        push(folder, "someone/small")
    assert held.asked == []


@pytest.mark.parametrize(
    ("file", "changed", "says"),
    [
        (
            "billhook.json",
            lambda text: text.replace('"text.txt"', '"/home/me/text.txt"'),
            "'/home/me/text.txt', which would be published",
        ),
        (
            "config.json",
            lambda text: text.replace("{", '{"_name_or_path": "/home/me/dense",', 1),
            "'/home/me/dense', which would be published",
        ),
        ("README.md", lambda text: f"{text}\n| data | sources ~/texts/a.txt |\n", "'~/texts/', which would be published"),
    ],
)
def test_a_path_that_an_older_version_wrote_is_not_published(held, folder, file, changed, says):
    text = (folder / file).read_text()
    (folder / file).write_text(changed(text))
    assert (folder / file).read_text() != text
    with pytest.raises(ValueError, match=re.escape(f"{file} contains the absolute path {says}")):
        push(folder, "someone/small")
    assert held.asked == []
    (folder / file).write_text(text)
    push(folder, "someone/small")


def test_the_command(held, folder, capsys):
    main(["push", str(folder), "someone/small", "--private", "--revision", "first"])
    assert capsys.readouterr().out == f"Pushed to {held.url}/someone/small/commit/1\n"
    assert held.private == {"someone/small": True}
    assert held.repos["someone/small"]["first"] == files_in(folder)
    held.refuse = "/commit/"
    with pytest.raises(SystemExit, match=r"^billhook push: '.*small' was not pushed to someone/small: .*To retry, run `.*`$"):
        main(["push", str(folder), "someone/small"])
