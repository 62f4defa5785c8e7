"""What the small files of a Hugging Face folder say about its tokenizer, which the tokenizer's own file does not."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_mp.errors import RequestError
from llama_mp.files import read_small


@dataclass(frozen=True, kw_only=True)
class Settings:
    """None, or an empty tuple, where no file says anything."""

    bos_token: str | None = None
    eos_token: str | None = None
    adds_bos: bool | None = None
    end_ids: tuple[int, ...] = ()  # every one of them ends a generation
    template: str | None = None  # of chats

    def token_ids(self, known: Mapping[str, int], bos: str | None, eos: str | None) -> tuple[int | None, int | None]:
        """The ids of bos and eos among the `known` tokens; `bos` and `eos` are theirs by the tokenizer's own file."""
        for role, text in (("bos", self.bos_token), ("eos", self.eos_token)):
            if text is not None and text not in known:
                raise RequestError(
                    f"it has no token {text!r}, which tokenizer_config.json beside it names as {role}_token; "
                    "give the model's own tokenizer.json"
                )
        return known.get(self.bos_token or bos), known.get(self.eos_token or eos)


def read_settings(folders: Sequence[Path]) -> Settings:
    """The settings in `folders`: of several files of one name, the first folder's counts.

    Raises RequestError for a file that is damaged.
    """
    tokens = read_object("special_tokens_map.json", folders) | read_object("tokenizer_config.json", folders)
    generation = read_object("generation_config.json", folders) or read_object("config.json", folders)
    ends = generation.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(type(end) is int for end in ends):
        raise RequestError(
            f"eos_token_id of generation_config.json or config.json is {ends}, but must be whole numbers"
        )
    adds_bos = tokens.get("add_bos_token")
    if adds_bos is not None and not isinstance(adds_bos, bool):
        raise RequestError(f"add_bos_token of tokenizer_config.json is {adds_bos!r}, but must be true or false")
    return Settings(
        bos_token=text_of(tokens, "bos_token"),
        eos_token=text_of(tokens, "eos_token"),
        adds_bos=adds_bos,
        end_ids=tuple(ends),
        template=read_template(folders, tokens.get("chat_template")),
    )


def read_object(name: str, folders: Sequence[Path]) -> dict[str, Any]:
    """The JSON object in the first file of this name, an empty one when there is no such file."""
    path = find(name, folders)
    if path is None:
        return {}
    content = read_small(path)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON, or cut short: {error}; download it again") from error
    if not isinstance(found, dict):
        raise RequestError(f"{path} is JSON, but not an object; download it again")
    return found


def find(name: str, folders: Sequence[Path]) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def text_of(tokens: dict[str, Any], role: str) -> str | None:
    """The text of a special token, written as such or as an object with its `content`."""
    token = tokens.get(role)
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str | None):
        raise RequestError(f"{role} of tokenizer_config.json is {token!r}, but must be a text")
    return text or None


def read_template(folders: Sequence[Path], configured: Any) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's: one text, or several of which `default` is for chats."""
    path = find("chat_template.jinja", folders)
    if path is not None:
        try:
            return read_small(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"{path} is not UTF-8 text; download it again") from error
    if isinstance(configured, list):
        named = [entry for entry in configured if isinstance(entry, dict) and entry.get("name") == "default"]
        configured = named[0].get("template") if named else None
    if not isinstance(configured, str | None):
        raise RequestError("chat_template of tokenizer_config.json is neither a text nor a list of named texts")
    return configured
