"""Chats, and templates that write them."""

from transformers import AutoTokenizer

from billhook.assets import model_path

PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
TAGGED = (
    "{% for m in messages %}[{{ m['role'] }}]\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
"""The same text, with what the assistant writes marked."""


def chat(*contents):
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def talking(template=PLAIN):
    """The embedded model's tokenizer with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny"))
    tokenizer.chat_template = template
    return tokenizer
