"""Makes sections of the examples in docstrings: `Example:`, and a bare `>>>` at the end, as pytest reads both."""

import re

import griffe


class Examples(griffe.Extension):
    """Gives examples the heading that griffe knows."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **_: object) -> None:
        """Rewrites the docstring of a module, class, function or attribute."""
        if obj.docstring is None:
            return
        text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        before, gap, example = text.rpartition("\n\n>>> ")
        if gap:
            text = f"{before}\n\nExamples:\n    " + f">>> {example}".replace("\n", "\n    ")
        obj.docstring.value = text
