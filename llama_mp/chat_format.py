"""A conversation as the prompt that its checkpoint was trained on, by the checkpoint's own template."""

from collections.abc import Mapping, Sequence
from importlib.resources import files

from llama_mp import template_sandbox
from llama_mp.errors import RequestError
from llama_mp.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")

# Meta's folders hold no template. Ours for them are NAME.jinja in this package; the special tokens that each writes:
BUILT_IN = {
    "llama2": ("<s>", "</s>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}

# Units of work (see template_sandbox) that rendering may take: a hundred times what known templates take.
WORK, WORK_PER_CHAR, WORK_PER_MESSAGE = 5_000_000, 100, 10_000


def built_in_template(name: str, tokenizer: Tokenizer) -> str:
    """The template of a format of BUILT_IN. Raises RequestError when `tokenizer` lacks a special token of it."""
    missing = [token for token in BUILT_IN[name] if token not in tokenizer.special]
    if missing:
        raise RequestError(f"--chat_format {name} needs the special tokens {', '.join(missing)}, which the model lacks")
    return (files("llama_mp") / f"{name}.jinja").read_text(encoding="utf-8")


def render_chat(template: str | None, messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> list[int]:
    """Ids of the prompt after which the assistant answers `messages`; contents cannot add special tokens.

    Raises RequestError when the checkpoint has no template, a message is malformed, or the template fails.
    """
    check_messages(messages)
    safe = [{"role": message["role"], "content": tokenizer.protect(message["content"])} for message in messages]
    return tokenizer.encode_template(render_text(template, safe, tokenizer.bos_token, tokenizer.eos_token))


def check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    """Raise RequestError, with the index, unless each message is a `role` of ROLES and a `content`, both texts."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError("messages must be a list of at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise RequestError(f"messages[{index}] must be an object with the keys role and content, and no others")
        if message["role"] not in ROLES:
            raise RequestError(f"messages[{index}]: role is {message['role']!r}, but must be one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise RequestError(f"messages[{index}]: content must be a text, not {kind}")


def render_text(template: str | None, messages: Sequence[Mapping[str, str]], bos_token: str, eos_token: str) -> str:
    """The template's text, generation prompt included; the caller has checked and protected the messages."""
    if not template:
        raise RequestError(
            "the checkpoint has no chat template, which makes it a base model: give infer a plain prompt, without "
            "--chat; if it is a chat model, name its format with --chat_format llama2 or llama3"
        )
    variables = {
        "messages": messages,
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": True,
        "tools": None,  # Hugging Face passes these two always, and templates ask whether they are none
        "documents": None,
    }
    num_chars = sum(len(message["content"]) for message in messages)
    budget = WORK + WORK_PER_CHAR * num_chars + WORK_PER_MESSAGE * len(messages)
    return template_sandbox.render(template, variables, budget)
