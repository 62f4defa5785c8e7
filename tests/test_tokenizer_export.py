"""The files that a folder needs: read back by ourselves and by transformers, they are the tokenizer they came from."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from factory import MODELS, finish_gguf, gguf_writer
from kinds import (
    gguf_of_sentencepiece,
    write_config,
    write_json_bytes,
    write_json_pieces,
    write_sentencepiece,
    write_tiktoken,
)
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from strings import strings
from transformers import AutoTokenizer

from llama_mp.chat_format import render_chat
from llama_mp.errors import RequestError
from llama_mp.locate import TOKENIZER_NAMES
from llama_mp.tokenizer import Tokenizer
from llama_mp.tokenizer_export import SETTINGS_FILES, tokenizer_folder
from llama_mp.tokenizer_files import read_tokenizer
from llama_mp.vocabulary import BYTE, UNKNOWN

COMPOSED = ["sentencepiece", "normalizing", "spaces", "gguf llama", "gguf bare", "gguf gpt2", "tiktoken"]
EXISTING = ["json bytes", "json legacy", "json metaspace"]
Sources = dict[str, Path]
Exported = dict[tuple[str, bool], Path]  # by name and `hugging_face`

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": " Be  brief.\n"},
        {"role": "user", "content": "敏捷的 🤖?"},
        {"role": "assistant", "content": "def f(x):\n\treturn x"},
        {"role": "user", "content": ""},
    ],
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path, smollm2_file: Path) -> Sources:
    """A tokenizer's file of every kind, with what belongs to it beside it."""
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in COMPOSED + EXISTING}
    model = write_sentencepiece(folders["sentencepiece"] / "tokenizer.model")
    metadata = gguf_of_sentencepiece(model)
    return {
        "sentencepiece": model,
        "normalizing": tokenizer_file,
        "spaces": with_runs_of_spaces(model, folders["spaces"]),
        "gguf llama": write_gguf_tokenizer(folders["gguf llama"], metadata | {"tokenizer.chat_template": TEMPLATE}),
        "gguf bare": write_gguf_tokenizer(folders["gguf bare"], bare(metadata)),
        "gguf gpt2": smollm2_file,
        "tiktoken": write_tiktoken(folders["tiktoken"] / "tokenizer.model"),
        "json bytes": write_json_bytes(folders["json bytes"]),
        "json legacy": write_json_pieces(folders["json legacy"], model, legacy=True),
        "json metaspace": write_json_pieces(folders["json metaspace"], model, legacy=False),
    }


def with_runs_of_spaces(model_file: Path, folder: Path) -> Path:
    """LLaMA's model has pieces for 2 to 16 spaces, all with one score. Half of a control token, and a template too."""
    model = ModelProto.FromString(model_file.read_bytes())
    known = {piece.piece for piece in model.pieces}
    for length in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 15):
        if "▁" * length not in known:
            model.pieces.add(piece="▁" * length)
    model.pieces.add(piece="<s", score=-1)
    for piece in model.pieces:
        if piece.type == ModelProto.SentencePiece.NORMAL and not piece.piece.strip("▁"):
            piece.score = -1e9
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    return folder / "tokenizer.model"


def bare(metadata: dict) -> dict:
    """Without tokens for bytes, so that what is unknown is that, and with nothing put before a text."""
    kept = [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind != BYTE]
    lists = {key: [values[i] for i in kept] for key, values in metadata.items() if isinstance(values, list)}
    return metadata | lists | {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}


def write_gguf_tokenizer(folder: Path, metadata: dict) -> Path:
    writer = gguf_writer(folder / "model.gguf", MODELS["gqa"])
    for key, value in metadata.items():
        add = {list: writer.add_array, bool: writer.add_bool, str: writer.add_string}[type(value)]
        add(key, value)
    return finish_gguf(writer, folder / "model.gguf")


def export(path: Path, folder: Path, hugging_face: bool) -> Path:
    """The `folder`, as a Meta folder or as one that transformers may read."""
    folder.mkdir()
    for name, content in tokenizer_folder(path, path.parent, hugging_face=hugging_face).items():
        (folder / name).write_bytes(content)
    if hugging_face:
        (folder / "config.json").write_text(
            '{"model_type": "llama"}'
        )  # makes AutoTokenizer think of a class of its own
    return folder


@pytest.fixture(scope="module")
def exported(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The folders made of the sources."""
    made = tmp_path_factory.mktemp("exported")
    return {
        (name, hugging_face): export(path, made / f"{name} {hugging_face}", hugging_face)
        for name, path in sources.items()
        for hugging_face in (False, True)
    }


def read_back(folder: Path, hugging_face: bool) -> tuple[Tokenizer, str | None]:
    """As `locate` chooses the file: a Meta folder's tokenizer.model goes first."""
    names = TOKENIZER_NAMES[::-1] if hugging_face else TOKENIZER_NAMES
    return read_tokenizer(next(folder / name for name in names if (folder / name).is_file()), folder)


def check_same(ours: Tokenizer, original: Tokenizer) -> None:
    parts = ("tokens", "special", "bos_id", "eos_id", "bos_token", "eos_token", "eos_ids", "adds_bos")
    assert {part: getattr(ours, part) for part in parts} == {part: getattr(original, part) for part in parts}
    ids = range(original.vocab_size)
    assert list(map(ours.token_bytes, ids)) == list(map(original.token_bytes, ids))
    for text in texts():
        assert ours.encode(text, bos=False) == original.encode(text, bos=False), text
    for text in template_texts(original):
        assert ours.encode_template(text) == original.encode_template(text), text


def texts() -> list[str]:
    runs = [
        before + " " * count + after for count in range(100) for before, after in (("", ""), ("a", "b"), ("\n", "the"))
    ]
    return strings(1000) + runs + ["<tool>", "a<tool> b<tool><tool> <tool", "<tool><|odd|>x", " <tool>"]


def template_texts(tokenizer: Tokenizer) -> Iterator[str]:
    rng, parts = random.Random(4), strings(400)
    for _ in range(300):
        mixed = (
            rng.choice(["", *tokenizer.special]) + rng.choice(["", " ", "\n", rng.choice(parts)]) for _ in range(6)
        )
        yield "".join(mixed)


# ---- what comes back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hugging_face", [False, True], ids=["meta", "hf"])
@pytest.mark.parametrize("name", COMPOSED + EXISTING)
def test_our_own_reading_is_the_original(name: str, hugging_face: bool, sources: Sources, exported: Exported) -> None:
    original, template = read_tokenizer(sources[name], sources[name].parent)
    ours, ours_template = read_back(exported[name, hugging_face], hugging_face)
    assert ours_template == template
    check_same(ours, original)


@pytest.mark.parametrize("name", [*COMPOSED, "json bytes"])
def test_transformers_reading_is_the_original(name: str, sources: Sources, exported: Exported) -> None:
    original, template = read_tokenizer(sources[name], sources[name].parent)
    theirs = AutoTokenizer.from_pretrained(exported[name, True])
    assert (theirs.bos_token_id, theirs.eos_token_id) == (original.bos_id, original.eos_id)
    assert len(theirs) == original.vocab_size
    prefix = original.decode(original.encode("a", bos=False)).removesuffix("a")
    for text in texts():
        ids = theirs.encode(text, split_special_tokens=True)  # a special token in a text stays text
        assert ids == original.encode(text, bos=original.adds_bos), text
        if UNKNOWN not in (original.types[i] for i in ids):  # each library has a text of its own for that
            assert theirs.decode(ids, skip_special_tokens=True) == original.decode(ids).removeprefix(prefix), text
    for text in template_texts(original):
        ids = theirs.encode(text, add_special_tokens=False)
        leading = [original.bos_id] if original.adds_bos and ids[:1] != [original.bos_id] else []
        assert original.encode_template(text) == leading + ids, text
    assert (theirs.chat_template is None) == (template is None)
    for chat in CHATS if template else []:
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ids == render_chat(template, chat, original)


def test_ends_of_generation_that_transformers_would_not_know(exported: Exported) -> None:
    all_ends = {"gguf gpt2": "<|endoftext|> <|im_end|>", "tiktoken": "<|end_of_text|> <|eom_id|> <|eot_id|>"}
    for name, ends in all_ends.items():
        ids = AutoTokenizer.from_pretrained(exported[name, True]).convert_tokens_to_ids(ends.split())
        assert json.loads((exported[name, True] / "generation_config.json").read_text()) == {"eos_token_id": ids}


def test_which_files(exported: Exported) -> None:
    composed = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    with_model = composed | {"tokenizer.model"}
    for name, meta, hugging_face in (
        ("sentencepiece", {"tokenizer.model"}, with_model),
        ("tiktoken", {"tokenizer.model"}, with_model),
        ("gguf gpt2", composed, composed),
        ("gguf llama", with_model - {"tokenizer.json"}, with_model),
        ("spaces", {"tokenizer.model", "chat_template.jinja"}, with_model | {"chat_template.jinja"}),
    ):
        assert {path.name for path in exported[name, False].iterdir()} == meta
        assert {path.name for path in exported[name, True].iterdir()} == hugging_face | {"config.json"}


# ---- what exists -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hugging_face", [False, True], ids=["meta", "hf"])
def test_files_are_passed_on_byte_for_byte_the_first_folder_s_first(tmp_path: Path, hugging_face: bool) -> None:
    beside, checkpoint = tmp_path / "beside", tmp_path / "checkpoint"
    beside.mkdir(), checkpoint.mkdir()
    path = write_json_bytes(beside).rename(beside / "tokenizer.model")  # the content counts, not the name
    (beside / "generation_config.json").unlink()
    (checkpoint / "config.json").write_text('{"eos_token_id": 3}')
    for name in SETTINGS_FILES:
        (checkpoint / name).write_text("{ }\n")
    (checkpoint / "added_tokens.json").unlink()
    files = tokenizer_folder(path, checkpoint, hugging_face=hugging_face)
    assert files.pop("tokenizer.json") == path.read_bytes()
    assert files.pop("tokenizer_config.json") == (beside / "tokenizer_config.json").read_bytes()
    assert json.loads(files.pop("generation_config.json")) == {"eos_token_id": [3]}, (
        "config.json's: theirs says nothing"
    )
    assert files == {"special_tokens_map.json": b"{ }\n", "chat_template.jinja": b"{ }\n"}
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": 4 }')
    kept = tokenizer_folder(path, checkpoint, hugging_face=hugging_face)["generation_config.json"]
    assert kept == b'{"eos_token_id": 4 }'


def test_settings_beside_a_sentencepiece_model(sources: Sources, tmp_path: Path) -> None:
    """They count in both kinds of folder. A Hugging Face folder gets none of their tokens, which the model lacks."""
    write_config(tmp_path, eos_token="<tool>", add_bos_token=False, chat_template=TEMPLATE, model_max_length=7)
    (tmp_path / "added_tokens.json").write_text('{"<new>": 1200}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sources["sentencepiece"].read_bytes())
    original, template = read_tokenizer(path, tmp_path)
    for hugging_face in (False, True):
        folder = export(path, tmp_path / f"out {hugging_face}", hugging_face)
        ours, ours_template = read_back(folder, hugging_face)
        assert ours_template == template == TEMPLATE
        check_same(ours, original)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.encode("a<new>b") == original.encode("a<new>b", bos=False)
    assert (theirs.eos_token, len(theirs)) == ("<tool>", original.vocab_size)


@pytest.mark.parametrize("name", ["sentencepiece", "spaces", "gguf llama", "tiktoken"])
def test_tokenizer_model_comes_back_from_a_hugging_face_folder(name: str, sources: Sources, tmp_path: Path) -> None:
    """Meta's programs need it in a Meta folder, where it goes before tokenizer.json: only if it is the same."""
    between = export(sources[name], tmp_path / "between", hugging_face=True)
    model, path = (between / "tokenizer.model").read_bytes(), between / "tokenizer.json"
    assert tokenizer_folder(path, between, hugging_face=False)["tokenizer.model"] == model
    pipeline = json.loads(path.read_text())
    new = {"id": len(pipeline["model"]["vocab"]), "content": "<new>"}
    pipeline["added_tokens"].append(pipeline["added_tokens"][0] | new)
    path.write_text(json.dumps(pipeline))
    assert "tokenizer.model" not in tokenizer_folder(path, between, hugging_face=False)
    assert tokenizer_folder(path, between, hugging_face=True)["tokenizer.model"] == model
    write_config(between, bos_token="<new>")
    assert "tokenizer.model" not in tokenizer_folder(path, between, hugging_face=False)


def test_tokenizer_model_that_treats_special_tokens_otherwise_stays_behind(sources: Sources, tmp_path: Path) -> None:
    """Hugging Face's newer files put no ▁ after a special token, sentencepiece does: the ids of chats differ."""
    folder = export(sources["sentencepiece"], tmp_path / "between", hugging_face=True)
    pipeline = json.loads((folder / "tokenizer.json").read_text())
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    (folder / "tokenizer.json").write_text(json.dumps(pipeline | {"normalizer": None, "pre_tokenizer": metaspace}))
    assert "tokenizer.model" not in tokenizer_folder(folder / "tokenizer.json", folder, hugging_face=False)


# ---- what cannot be ---------------------------------------------------------------------------------------------


def test_a_model_of_another_type_stays_in_meta_s_format(sources: Sources, tmp_path: Path) -> None:
    model = ModelProto.FromString(sources["sentencepiece"].read_bytes())
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    (path := tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    assert tokenizer_folder(path, tmp_path, hugging_face=False) == {"tokenizer.model": path.read_bytes()}
    with pytest.raises(RequestError, match="only of a sentencepiece model like LLaMA's, of type BPE"):
        tokenizer_folder(path, tmp_path, hugging_face=True)


def test_the_one_place_where_a_control_token_s_text_counts(sources: Sources, exported: Exported) -> None:
    """Alone between two user-defined symbols: by transformers only, ours hides these tokens."""
    original = read_tokenizer(sources["sentencepiece"])[0]
    folder = exported["sentencepiece", True]
    ours, theirs = read_back(folder, hugging_face=True)[0], AutoTokenizer.from_pretrained(folder)
    odd, fine = "a<tool>[CTRL]<tool>", "a<tool> [CTRL]<tool>"
    assert original.special["[CTRL]"] in theirs.encode(odd, split_special_tokens=True)
    assert ours.encode(odd, bos=False) == original.encode(odd, bos=False)
    assert theirs.encode(fine, split_special_tokens=True) == original.encode(fine, bos=True)
