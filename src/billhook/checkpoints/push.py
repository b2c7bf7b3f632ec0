"""Pushes a saved folder to the Hub, by huggingface_hub."""

import json
import shlex
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from billhook.atomic_folder import RECORD
from billhook.checkpoints.origin import CARD
from billhook.private_paths import absolute_paths


class NotPushed(RuntimeError):
    """Raised when the Hub has not taken a folder, which stays as it is; the message says how to try again."""


def check_repository(argument: str, name: object) -> None:
    """Refuses what is no name of a repository of the Hub.

    >>> check_repository("push_to_hub", "a model")
    Traceback (most recent call last):
    ValueError: push_to_hub='a model' must be the name of a repository of the Hub, as in 'user/name'
    """
    legal = f"{argument}={name!r} must be the name of a repository of the Hub, as in 'user/name'"
    if not isinstance(name, str) or name.count("/") != 1:
        raise ValueError(legal)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{legal}: {error}") from None


def check_token(argument: str, name: str) -> None:
    """Refuses a push that cannot come about: without a token, or offline."""
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{argument}='{name}': HF_HUB_OFFLINE is set, so nothing can be pushed: unset it")
    if get_token() is None:
        raise ValueError(f"{argument}='{name}': there is no token of the Hub on this machine: `hf auth login`, or set HF_TOKEN")


def push(folder: str | Path, name: str, private: bool = False, revision: str | None = None) -> str:
    """Pushes a folder that billhook saved and verified to a repository of the Hub, which is made if it is not there.

    Args:
        folder: The folder; all of it is pushed, in one commit.
        name: The repository, as in `"user/name"`.
        private: Whether the repository must be private; otherwise a new one is as the account has it by default.
        revision: The branch, which is made if it is not there; by default `main`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: Before anything is pushed, if the folder is no complete checkpoint of billhook's, the name is none of a
            repository, its record, card or config holds an absolute path, as older versions wrote them, there is no token, or
            the Hub is switched off.
        NotPushed: If the Hub does not take it, or the repository is public and `private` was asked for.
    """
    check_repository("name", name)
    check_token("name", name)
    _check_saved(Path(folder))
    _check_paths(Path(folder))
    try:
        return _pushed(HfApi(library_name="billhook"), str(folder), name, private, revision)
    except Exception as error:  # of the network, the Hub or its client
        why = _why(error)
        words = ["billhook", "push", str(folder), name, *["--private"] * private, *(["--revision", revision] if revision else [])]
        again = shlex.join(words)
        raise NotPushed(f"'{folder}' is not pushed to {name}: {why}. The folder is as it was; `{again}` tries again") from error


def _why(error: BaseException) -> str:
    """Says in a line what went wrong, with what lies behind it."""
    said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return said if error.__cause__ is None or str(error.__cause__) in str(error) else f"{said}: {_why(error.__cause__)}"


def _pushed(api: HfApi, folder: str, name: str, private: bool, revision: str | None) -> str:
    api.create_repo(name, private=private or None, exist_ok=True)
    if private and not api.repo_info(name).private:
        raise PermissionError("the repository is there already, and it is public: make it private, or name another")
    if revision is not None:
        api.create_branch(name, branch=revision, exist_ok=True)
    commit = api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message="Saved by billhook")
    return str(commit.commit_url)


def _check_saved(folder: Path) -> None:
    """Refuses a folder that is not as `save` wrote it and verified it."""
    legal = "only what billhook has saved, which verifies it, is pushed"
    try:
        files = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
        missing = [file for file in files if not (folder / file).exists()]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"folder='{folder}': it holds no {RECORD} as billhook writes it, and {legal}") from None
    if missing:
        raise ValueError(f"folder='{folder}': {missing[0]} is missing, and {legal}")


def _check_paths(folder: Path) -> None:
    """Refuses a record, card or config that says where files lay on a machine, as older versions wrote it."""
    texts: dict[str, object] = {}
    for file in (RECORD, "config.json", CARD):
        if (folder / file).is_file():
            text = (folder / file).read_text(encoding="utf-8", errors="replace")
            texts[file] = text if file == CARD else json.loads(text)
    config = texts.get("config.json")
    texts["config.json"] = config.get("_name_or_path") if isinstance(config, dict) else None
    for file, content in texts.items():
        if paths := list(dict.fromkeys(absolute_paths(content))):
            more = f" and {len(paths) - 1:,} more" if len(paths) > 1 else ""
            raise ValueError(
                f"folder='{folder}': {file} holds the absolute path '{paths[0][:200]}'{more}, which all who see the repository "
                "would read: take it out, or load the model, save it with this billhook (bh.save), and push that"
            )
