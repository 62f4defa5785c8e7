"""tokenizer.json: what its files tell, its templates beside transformers, and what is refused."""

import json
import random
from pathlib import Path

import pytest
from kinds import Kind, json_oracle, write_config, write_json_bytes, write_json_pieces
from strings import strings
from transformers import PreTrainedTokenizerFast

from llama_mp.errors import RequestError
from llama_mp.tokenizer import Tokenizer
from llama_mp.tokenizer_files import load_tokenizer
from llama_mp.vocabulary import BYTE_OF_LETTER


@pytest.fixture(scope="module", params=["bytes", "legacy", "metaspace"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sentencepiece_file: Path) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "bytes":
        return write_json_bytes(folder)
    return write_json_pieces(folder, sentencepiece_file, legacy=request.param == "legacy")


def tiny(**changes: object) -> dict:
    """A byte-level tokenizer.json: the 256 bytes, two merges, a special token."""
    vocab = {letter: i for i, letter in enumerate([*BYTE_OF_LETTER, "ab", "abc"])}
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["ab", "c"]]}
    added = [{"id": 258, "content": "<s>", "special": True, **dict.fromkeys(FLAGS, False)}]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    made = {"version": "1.0", "added_tokens": added, "pre_tokenizer": byte_level, "model": model} | changes
    return {key: value for key, value in made.items() if value is not None}


FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def load(folder: Path, pipeline: dict, **settings: object) -> Tokenizer:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(pipeline))
    if settings:
        write_config(folder, **settings)
    return load_tokenizer(path)


def test_what_the_files_beside_tell(kinds: dict[str, Kind]) -> None:
    by_bytes, by_pieces = kinds["json bytes"].tokenizer, kinds["json metaspace"].tokenizer
    assert (by_bytes.bos_token, by_bytes.eos_token, by_bytes.adds_bos) == ("<|begin_of_text|>", "<|end_of_text|>", True)
    ends = ("<|end_of_text|>", "<|eot_id|>")
    assert by_bytes.eos_ids == {by_bytes.special[text] for text in ends}, "all that generation_config.json lists"
    assert (by_pieces.bos_token, by_pieces.bos_id, by_pieces.eos_ids, by_pieces.adds_bos) == ("<s>", 1, {2}, True)
    assert by_pieces.special == {"<s>": 1, "</s>": 2, "[CTRL]": 3, "<|odd|>": 5}


def test_adds_bos_is_the_post_processor_s_unless_the_config_says_so(tmp_path: Path) -> None:
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [258], "tokens": ["<s>"]}}
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    alone = load(tmp_path, tiny(post_processor=template))
    assert (alone.bos_id, alone.adds_bos, alone.eos_id) == (258, True, None)
    within = load(tmp_path, tiny(post_processor={"type": "Sequence", "processors": [template]}))
    assert (within.bos_id, within.adds_bos) == (258, True)
    assert not load(tmp_path, tiny(post_processor=template), add_bos_token=False).adds_bos
    assert load(tmp_path, tiny(), bos_token="<s>", add_bos_token=True).adds_bos
    without = load(tmp_path, tiny(), bos_token="<s>")
    assert (without.bos_id, without.adds_bos) == (258, False)
    assert not load(tmp_path, tiny(), add_bos_token=True).adds_bos, "there is no bos to add"


def test_templates_are_encoded_as_transformers_does(file: Path) -> None:
    """Special tokens with texts between them, spaces at their edges too, which some of them swallow."""
    ours, oracle, rng = load_tokenizer(file), PreTrainedTokenizerFast.from_pretrained(file.parent), random.Random(3)
    special = list(ours.special)
    texts = [text for text in strings(600) if "<s" not in text and "<unk" not in text]  # see merges_of
    for _ in range(600):
        text = "".join(
            rng.choice(special) + rng.choice(["", " ", "\n\n", "  "]) + rng.choice(texts) + rng.choice(["", " ", "\n"])
            for _ in range(rng.randrange(1, 5))
        )
        text = rng.choice(["", "start", " x "]) + text
        ids = ours.encode_template(text)
        expected = oracle.encode(text, add_special_tokens=False)
        assert ids == (expected if expected[:1] == [ours.bos_id] else [ours.bos_id, *expected]), text


def test_user_defined_tokens_stay_whole_and_literal(file: Path) -> None:
    tokenizer = load_tokenizer(file)
    tool = json_oracle(file).convert_tokens_to_ids("<tool>")
    assert tool in tokenizer.encode("a<tool>b", bos=False)
    assert tokenizer.decode([tool]) == "<tool>" and tool not in tokenizer.special.values()


def test_a_control_token_is_not_merged_from_a_text(kinds: dict[str, Kind]) -> None:
    """The library alone would: the file's merges make `<s>`."""
    kind = kinds["json legacy"]
    assert 1 in kind.encode("a<s>b")
    assert 1 not in kind.tokenizer.encode("a<s>b", bos=False)
    assert kind.tokenizer.decode(kind.tokenizer.encode("a<s>b", bos=False)) == " a<s>b"


def test_dropout_truncation_and_padding_have_no_effect(tmp_path: Path) -> None:
    plain = load(tmp_path, tiny())
    model = tiny()["model"] | {"dropout": 0.9}
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    odd = load(tmp_path, tiny(model=model, truncation=truncation, padding=padding | {"pad_to_multiple_of": None}))
    for _ in range(20):
        assert odd.encode("abc abc", bos=False) == plain.encode("abc abc", bos=False)


def test_merges_of_the_old_form_and_ids_with_holes(tmp_path: Path) -> None:
    model = tiny()["model"]
    old = {"vocab": model["vocab"], "merges": ["a b", "ab c"]}
    added = [tiny()["added_tokens"][0] | {"id": 300}]
    tokenizer = load(tmp_path, tiny(model=old, added_tokens=added))
    assert tokenizer.encode("abc", bos=False) == [257]
    assert (tokenizer.vocab_size, tokenizer.special, tokenizer.token_bytes(280)) == (301, {"<s>": 300}, b"")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "no tokenizer.json: it has no `model`"),
        ({"model": {"type": "Unigram", "vocab": []}}, "model is of type Unigram, but only BPE"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}}}, "not a whole tokenizer.json: KeyError 'merges'"),
        ({"model": {"type": "BPE", "vocab": {"a": 2**40}, "merges": []}}, "its ids go from"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "its ids go from -1"),
        ({"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}}, "not a whole tokenizer.json"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "q"]]}}, "the tokenizers library refuses it"),
        ({"pre_tokenizer": None}, "neither in bytes"),
        ({"added_tokens": [{"id": 258}]}, "not a whole tokenizer.json: KeyError 'content'"),
        ({"pre_tokenizer": {"type": "ByteLevel", "x": "y"}}, "the tokenizers library refuses it"),
    ],
)
def test_faulty_files_are_refused_in_one_line(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        load(tmp_path, tiny(**changes))
    assert str(caught.value).startswith(f"tokenizer {tmp_path / 'tokenizer.json'}: ")


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tiny())[:-5])
    with pytest.raises(RequestError, match="not JSON, or cut short"):
        load_tokenizer(path)
