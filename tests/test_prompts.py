"""Prompts files good and bad, and standard input as a shell hands it over."""

import json
import os
import subprocess
import sys
import tracemalloc

import pytest

from llama_mp.config import SamplingConfig
from llama_mp.errors import RequestError, one_line
from llama_mp.prompts import BUILT_IN_PROMPTS, MAX_LINE_BYTES, Prompt, read_prompts_file

SAMPLING = SamplingConfig(temperature=0.25, max_gen_len=9)


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_file_ids_are_line_numbers(tmp_path):
    path = write(tmp_path, "p.txt", "first \n\n  \n  second\u2028still\x0bsecond\n\n")
    prompts, num_blank = read_prompts_file(path, SAMPLING)
    assert prompts == [
        Prompt(id="0", text="first ", sampling=SAMPLING),
        Prompt(id="3", text="  second\u2028still\x0bsecond", sampling=SAMPLING),
    ]
    assert num_blank == 3


@pytest.mark.parametrize("name", ["p.txt", "P.TXT"])
@pytest.mark.parametrize("content", [b"\xef\xbb\xbfone\r\ntwo\r\n", b"one\ntwo", b"one\r\ntwo"])
def test_byte_order_mark_and_line_ends_are_forgiven(tmp_path, name, content):
    prompts, num_blank = read_prompts_file(write(tmp_path, name, content), SAMPLING)
    assert [p.text for p in prompts] == ["one", "two"]
    assert num_blank == 0


def test_jsonl(tmp_path):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    lines = [
        {"id": "a", "prompt": "x" * 200_000},
        {"id": 7, "messages": messages, "temperature": 0, "stop": "\n", "seed": 3},
        {"id": "c", "prompt": "", "stop": ["a", "b"], "logprobs": True},
    ]
    content = "\ufeff" + "\r\n".join(json.dumps(line) for line in lines) + "\r\n\r\n"
    (first, second, third), num_blank = read_prompts_file(write(tmp_path, "p.jsonl", content), SAMPLING)
    assert first == Prompt(id="a", text="x" * 200_000, sampling=SAMPLING)
    overridden = SamplingConfig(temperature=0, max_gen_len=9, stop=("\n",), seed=3)
    assert second == Prompt(id="7", messages=tuple(messages), sampling=overridden)
    assert (third.text, third.sampling.stop, third.sampling.logprobs) == ("", ("a", "b"), True)
    assert num_blank == 1


GOOD = '{"id": "1", "prompt": "p"}\n'
BAD_LINES = {
    '{"id": 1, "prompt": "p"}': "id '1' is that of line 1 too",
    "{'id': 2}": "not JSON: Expecting property name.* at column 2",
    '"text"': 'not an object but "text"',
    "[1]": "not an object",
    '{"prompt": "p"}': "no id",
    '{"id": "2"}': "neither prompt and messages",
    '{"id": "2", "prompt": "p", "messages": []}': "both prompt and messages",
    '{"id": true, "prompt": "p"}': "id is true, but must be a text or a whole number",
    '{"id": 1.5, "prompt": "p"}': "id is 1.5",
    '{"id": null, "prompt": "p"}': "id is null",
    '{"id": "2", "prompt": ["p"]}': r'prompt is \["p"\], but must be a text',
    '{"id": "2", "prompt": null}': "prompt is null",
    '{"id": "2", "messages": null}': "messages must be a list",
    '{"id": "2", "messages": []}': "messages must be a list",
    '{"id": "2", "messages": ["p"]}': r"messages\[0\] must be an object",
    '{"id": "2", "messages": [{"role": "user", "content": "a"}, {"role": "user"}]}': r"messages\[1\] must be",
    '{"id": "2", "prompt": "p", "temprature": 1}': "unknown field 'temprature' .did you mean temperature",
    '{"id": "2", "prompt": "p", "temperature": "hot"}': "temperature is 'hot'",
    '{"id": "2", "prompt": "p", "top_p": 2}': "top_p is 2",
    '{"id": "2", "prompt": "p", "temperature": NaN}': "temperature is nan",
    '{"id": "2", "prompt": "p", "prompt": "q"}': "field 'prompt' is there twice",
    '{"id": "2", "prompt": "\\ud83d"}': r"half a surrogate pair \(\\ud83d\)",
    '{"id": ' + "1" * 5000 + "}": "not readable as JSON",
    "[" * 100_000: "not readable as JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:60])
def test_bad_line_is_named(tmp_path, line):
    path = write(tmp_path, "p q.jsonl", GOOD + "\n" + line + "\n" + GOOD)
    with pytest.raises(RequestError, match=BAD_LINES[line]) as caught:
        read_prompts_file(path, SAMPLING)
    assert one_line(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("p.txt", b"good\nb\xe9d\n", r"p\.txt:2: not UTF-8 \(byte 0xe9 at column 2\)"),
        ("p.txt", "good".encode("utf-16"), r"p\.txt:1: not UTF-8"),
        ("p.jsonl", GOOD.encode() + b'{"id": "\xff"}', r"p\.jsonl:2: not UTF-8"),
        ("p.txt", b"", "holds no prompt"),
        ("p.txt", b" \n\n", "holds no prompt"),
        ("p.jsonl", b"\xef\xbb\xbf", "holds no prompt"),
        ("p.json", b"{}", r"unknown kind '.json'; valid: .txt .*, .jsonl"),
        ("p", b"text", "unknown kind ''"),
    ],
)
def test_bad_file(tmp_path, name, content, fault):
    with pytest.raises(RequestError, match=fault):
        read_prompts_file(write(tmp_path, name, content), SAMPLING)


def test_folder_and_missing_file(tmp_path):
    (tmp_path / "d.txt").mkdir()
    with pytest.raises(RequestError, match="is a folder"):
        read_prompts_file(tmp_path / "d.txt", SAMPLING)
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        read_prompts_file(tmp_path / "no.jsonl", SAMPLING)


READ = """
from llama_mp.errors import report
from llama_mp.prompts import read_standard_input
try:
    print(ascii(read_standard_input()))
except Exception as error:
    raise SystemExit(report(error))
"""


def run_reader(stdin=None, text=None):
    given = {"input": text} if stdin is None else {"stdin": stdin}
    return subprocess.run([sys.executable, "-c", READ], capture_output=True, timeout=60, check=False, **given)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"one\n", "one"),
        (b"one\r\n", "one"),
        (b" one\n\ntwo\n\n", " one\n\ntwo\n"),
        (b"\xef\xbb\xbfna\xc3\xafve", "na\u00efve"),
        (b"x" * 200_000, "x" * 200_000),
    ],
)
def test_a_pipe_is_one_prompt(text, expected):
    done = run_reader(text=text)
    assert (done.stdout.decode(), done.stderr) == (ascii(expected) + "\n", b"")


def test_a_redirected_file_is_one_prompt(tmp_path):
    with write(tmp_path, "p", "a\nb\n").open("rb") as file:
        assert run_reader(stdin=file).stdout == b"'a\\nb'\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [(b"", "give --prompt"), (b"\n", "give --prompt"), (b"ab\xff", "not UTF-8 (byte 0xff at column 3)")],
)
def test_bad_standard_input(text, fault):
    done = run_reader(text=text)
    assert done.returncode == 2
    assert done.stderr.decode().startswith("error: standard input")
    assert fault in done.stderr.decode()


def test_terminal_null_device_and_closed_input_are_no_prompt():
    assert run_reader(stdin=subprocess.DEVNULL).stdout == b"None\n"
    ours, theirs = os.openpty()
    assert run_reader(stdin=theirs).stdout == b"None\n"
    os.close(ours)
    os.close(theirs)
    with_none = ["sh", "-c", 'exec "$0" -c "$1" <&-', sys.executable, READ]
    closed = subprocess.run(with_none, capture_output=True, check=True)
    assert closed.stdout == b"None\n"


def test_three_built_in_prompts_that_go_on():
    assert len(BUILT_IN_PROMPTS) == 3
    assert not any(text.endswith((" ", ".", "?")) for text in BUILT_IN_PROMPTS)


# ---- abuse -----------------------------------------------------------------------------------------------------


def test_a_line_of_10_mb(tmp_path):
    path = write(tmp_path, "p.txt", "short\n" + "x" * 10_000_000 + "\nshort\n")
    with pytest.raises(RequestError, match=rf"p\.txt:2: the line has more than {MAX_LINE_BYTES} bytes"):
        read_prompts_file(path, SAMPLING)
    path = write(tmp_path, "p.jsonl", GOOD + '{"id": "2", "prompt": "' + "x" * 10_000_000 + '"}\n')
    with pytest.raises(RequestError, match=r"p\.jsonl:2: the line has more than"):
        read_prompts_file(path, SAMPLING)
    whole = "x" * (MAX_LINE_BYTES - 1)
    assert read_prompts_file(write(tmp_path, "p.txt", whole + "\n"), SAMPLING)[0][0].text == whole


def test_a_file_of_terabytes_is_not_read_to_its_end(tmp_path):
    path = write(tmp_path, "p.txt", "first\n")
    os.truncate(path, 1 << 40)  # a hole, of zeros and of no line's end
    tracemalloc.start()
    with pytest.raises(RequestError, match=r"p\.txt:2: the line has more than"):
        read_prompts_file(path, SAMPLING)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 4 * MAX_LINE_BYTES


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full", "/dev/urandom", "/dev/null", None])
def test_a_pipe_or_a_device_is_refused_at_once(tmp_path, device):
    path = tmp_path / "p.jsonl"
    path.symlink_to(device) if device else os.mkfifo(path)
    with pytest.raises(RequestError, match=r"p\.jsonl is a pipe or a device, which might never end; give a file"):
        read_prompts_file(path, SAMPLING)


def test_a_link_in_a_circle(tmp_path):
    (tmp_path / "p.txt").symlink_to("p.txt")
    with pytest.raises(RequestError, match=r"p\.txt cannot be read: Too many levels"):
        read_prompts_file(tmp_path / "p.txt", SAMPLING)
