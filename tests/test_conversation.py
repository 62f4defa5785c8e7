"""Whole turns, kept within a length; files whole or not at all."""

import json

import pytest

from llama_mp.conversation import Conversation
from llama_mp.errors import RequestError


def encode(messages):
    """One token a word."""
    return [0 for message in messages for _ in message["content"].split()]


def spoken(*turns: tuple[str, str], system: str | None = None) -> Conversation:
    conversation = Conversation(system)
    for question, answer in turns:
        conversation.ask(question, encode, 1000)
        conversation.answer(answer)
    return conversation


def contents(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages]


def test_all_is_kept_while_it_fits():
    conversation = spoken(("a a", "b b"), system="s")
    assert conversation.ask("c", encode, 6) == 0
    assert conversation.messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a a"},
        {"role": "assistant", "content": "b b"},
        {"role": "user", "content": "c"},
    ]


@pytest.mark.parametrize("room, dropped, left", [(8, 1, ["s", "c", "d d", "e e"]), (5, 2, ["s", "e e"])])
def test_the_oldest_turns_go_whole_and_the_system_message_stays(room, dropped, left):
    conversation = spoken(("a", "b b b"), ("c", "d d"), system="s")
    assert conversation.ask("e e", encode, room) == dropped
    assert contents(conversation) == left


def test_what_is_dropped_leaves_a_quarter_free_for_the_next_turns():
    conversation, dropped = Conversation(), []
    for turn in range(60):
        dropped.append(conversation.ask(f"q{turn}", encode, room=40))
        conversation.answer("a")
    assert set(dropped) == {0, 6}  # 41 messages become 29: ten turns are answered before six are dropped again
    assert 6 <= sum(map(bool, dropped)) <= 10


@pytest.mark.parametrize("system, told", [(None, "takes 4 tokens, and 3 fit"), ("s", "5 tokens with the system")])
def test_a_message_that_is_too_long_alone_changes_nothing(system, told):
    conversation = spoken(("a", "b"), system=system)
    before = conversation.messages
    with pytest.raises(RequestError, match=told):
        conversation.ask("c c c c", encode, 3)
    assert conversation.messages == before


def test_reset_keeps_the_system_message():
    conversation = spoken(("a", "b"), system="s")
    conversation.reset()
    assert contents(conversation) == ["s"]


@pytest.mark.parametrize("system", [None, "be kind"])
def test_what_was_saved_is_loaded(tmp_path, system):
    saved = spoken(("où?", "là \u2028 \N{ROBOT FACE}"), ("", ""), system=system)
    saved.save(tmp_path / "talk.json")
    loaded = spoken(("other", "talk"), system="other")
    loaded.load(tmp_path / "talk.json")
    assert (loaded.system, loaded.turns) == (saved.system, saved.turns)
    assert [file.name for file in tmp_path.iterdir()] == ["talk.json"]


def test_a_save_that_fails_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "talk.json"
    spoken(("a", "b")).save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(RequestError, match=r"talk\.json cannot be written: No space left on device"):
        spoken(("c", "d")).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["talk.json"]


def test_nowhere_to_save(tmp_path):
    with pytest.raises(RequestError, match="is a folder"):
        spoken(("a", "b")).save(tmp_path)
    with pytest.raises(RequestError, match="cannot be written: No such file or directory"):
        spoken(("a", "b")).save(tmp_path / "absent" / "talk.json")
    with pytest.raises(RequestError, match="nothing has been said"):
        Conversation().save(tmp_path / "talk.json")


def said(*roles: str) -> bytes:
    return json.dumps([{"role": role, "content": "x"} for role in roles]).encode()


@pytest.mark.parametrize(
    "content, told",
    [
        (None, "cannot be read: No such file"),
        (b"", "not a saved conversation"),
        (b"\xff", "not a saved conversation"),
        (b"[" * 100_000, "not a saved conversation"),
        (b'[{"role": "user", "content": "\\ud800"}]', "not a saved conversation"),
        (b"{}", "messages must be a list"),
        (b"[]", "at least one message"),
        (b'[{"role": "user"}]', r"messages\[0\] must be an object"),
        (b'[{"role": "user", "content": 3}]', "content must be a text"),
        (said("user"), "must take turns"),
        (said("assistant", "user"), "must take turns"),
        (said("user", "assistant", "system", "user"), "must take turns"),
    ],
)
def test_a_file_that_holds_no_conversation_changes_nothing(tmp_path, content, told):
    path = tmp_path / "talk.json"
    if content is not None:
        path.write_bytes(content)
    conversation = spoken(("a", "b"), system="s")
    with pytest.raises(RequestError, match=told) as refused:
        conversation.load(path)
    assert str(refused.value).startswith(str(path))
    assert contents(conversation) == ["s", "a", "b"]
