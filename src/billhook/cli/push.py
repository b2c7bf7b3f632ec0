"""`billhook push`: a saved folder to the Hub."""

from billhook.checkpoints.push import push as pushed


def push(folder: str, name: str, private: bool = False, revision: str | None = None) -> None:
    """Pushes a folder that billhook saved and verified to a repository of the Hub, which is made if it is not there.

    All files go in one commit, the model card as the repository's front page. The token is that of `hf auth login`, or HF_TOKEN.

    Args:
        folder: The folder that billhook saved, by a command, `Export` or bh.save.
        name: The repository, as in user/name.
        private: Whether the repository must be private; otherwise a new one is as the account has it by default.
        revision: The branch, which is made if it is not there; by default main.
    """
    print(f"pushed to {pushed(folder, name, private, revision)}")
