"""Pushing of saved folders to the Hub."""

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
    """Error for a failed push. The folder is unchanged; the message has the command to retry."""


def check_repository(argument: str, name: object) -> None:
    """Raises an error unless a value is the name of a Hub repository.

    >>> check_repository("push_to_hub", "a model")
    Traceback (most recent call last):
    ValueError: push_to_hub='a model' must be the name of a Hub repository, such as 'user/name'
    """
    legal = f"{argument}={name!r} must be the name of a Hub repository, such as 'user/name'"
    if not isinstance(name, str) or name.count("/") != 1:
        raise ValueError(legal)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{legal}: {error}") from None


def check_token(argument: str, name: str) -> None:
    """Raises an error if a push is impossible: offline, or without a token."""
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{argument}='{name}': HF_HUB_OFFLINE is set. Unset it to push.")
    if get_token() is None:
        raise ValueError(f"{argument}='{name}': no Hub token on this machine. Run `hf auth login`, or set HF_TOKEN.")


def push(folder: str | Path, name: str, private: bool = False, revision: str | None = None) -> str:
    """Pushes a billhook checkpoint to a Hub repository, which is created if it is missing.

    Args:
        folder: Folder to push, in one commit.
        name: Name of the repository, such as `"user/name"`.
        private: If True, requires a private repository. Otherwise a new repository uses the account's default.
        revision: Branch, which is created if it is missing. Defaults to `main`.

    Returns:
        URL of the commit.

    Raises:
        ValueError: Before the push, if the folder is not a complete billhook checkpoint, the name is illegal, the record, card,
            or config contains an absolute path, there is no token, or the Hub is offline.
        NotPushed: If the push fails, or `private` is set and the repository is public.
    """
    check_repository("name", name)
    check_token("name", name)
    legal = "Only folders that billhook saved, and so verified, can be pushed."
    try:
        files = json.loads(Path(folder, RECORD).read_text(encoding="utf-8"))["files"]
        missing = [file for file in files if not Path(folder, file).exists()]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"folder='{folder}' has no valid {RECORD}. {legal}") from None
    if missing:
        raise ValueError(f"folder='{folder}': {missing[0]} is missing. {legal}")
    for file in (RECORD, "config.json", CARD):
        if not Path(folder, file).is_file():
            continue
        text = Path(folder, file).read_text(encoding="utf-8", errors="replace")
        content = text if file == CARD else json.loads(text)
        if file == "config.json":
            content = content.get("_name_or_path") if isinstance(content, dict) else None
        if paths := list(dict.fromkeys(absolute_paths(content))):
            more = f" and {len(paths) - 1:,} more" if len(paths) > 1 else ""
            raise ValueError(
                f"folder='{folder}': {file} contains the absolute path '{paths[0][:200]}'{more}, which would be published. "
                "Remove it, or load the model, save it again with bh.save, and push that folder."
            )
    try:
        api = HfApi(library_name="billhook")
        api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise PermissionError("the repository exists and is public. Make it private, or choose another name")
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        message = "Saved by billhook"
        return str(api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message=message).commit_url)
    except Exception as error:  # of the network, the Hub or its client
        reason = _describe(error)
        options = ["--private"] * private + (["--revision", revision] if revision else [])
        retry = shlex.join(["billhook", "push", str(folder), name, *options])
        raise NotPushed(f"'{folder}' was not pushed to {name}: {reason}. To retry, run `{retry}`") from error


def _describe(error: BaseException) -> str:
    """Returns the messages of an error and its causes on a line."""
    message = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    cause = error.__cause__
    return message if cause is None or str(cause) in str(error) else f"{message}: {_describe(cause)}"
