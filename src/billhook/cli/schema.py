"""`billhook schema`: a JSON Schema of configs, for editors."""

import json

from billhook.cli.configs import config_schema


def schema() -> None:
    """Prints a JSON Schema of the configs of `billhook fit`, by which editors complete and check YAML.

    `billhook schema > billhook.schema.json`, and in the first line of a config beside it:
    `# yaml-language-server: $schema=billhook.schema.json`. A recipe names the file that comes along with it.
    """
    print(json.dumps(config_schema(), indent=1))
