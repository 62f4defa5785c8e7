"""What is refused before torch is imported, with nothing written; and when there is nothing left to do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from damage import write_manifest
from factory import MODELS, hugging_face, random_tensors, write_gguf, write_hf, write_meta
from gguf import GGMLQuantizationType

from llama_mp.errors import RequestError
from llama_mp.locate import Checkpoint
from llama_mp.reshard_request import ReshardFlags, check_request, is_finished, request_of

CONFIG = MODELS["gqa"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> dict[str, Path]:
    """A checkpoint of each format."""
    folder = tmp_path_factory.mktemp("models")
    found = {
        "meta": write_meta(folder / "meta", CONFIG, random_tensors(CONFIG), 2),
        "hf": write_hf(folder / "hf", hugging_face(CONFIG)),
    }
    (folder / "gguf").mkdir()
    found["gguf"] = write_gguf(folder / "gguf" / "m.gguf", CONFIG, random_tensors(CONFIG), GGMLQuantizationType.F16)
    (found["meta"] / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    return found


@pytest.fixture
def source(models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(models["meta"], tmp_path / "in"))


def flags(source: Path, output: Path, **more: Any) -> ReshardFlags:
    return ReshardFlags(input=source, output=output, **({"mp": 4} | more))


def refusal(source: Path, output: Path, **more: Any) -> str:
    """What is said; nothing may have been written."""
    root = output.absolute().parent
    before = tree(root) if root.is_dir() else []
    with pytest.raises(RequestError) as caught:
        asked = flags(source, output, **more)
        is_finished(asked, check_request(asked))
    assert not root.is_dir() or tree(root) == before
    assert "\n" not in str(caught.value) or "\n" in str(output)
    return str(caught.value)


def tree(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def done(source: Path, output: Path, **more: Any) -> Path:
    """A folder as the command leaves it, for all that is looked at here: the manifest, and files of its sizes."""
    asked = flags(source, output, **more)
    write_meta(output, CONFIG, random_tensors(CONFIG), 4)
    manifest = write_manifest(output) | request_of(asked, check_request(asked))
    (output / "manifest.json").write_text(json.dumps(manifest))
    return output


# ---- flags -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"mp": None}, "--mp INT is missing: the number of shards to write"),
        ({"mp": 0}, "--mp is 0, but must be at least 1"),
        ({"mp": -2, "format": "hf"}, "--mp is -2, but must be at least 1"),
        ({"mp": 2, "format": "hf"}, "--mp 2 with --format hf: safetensors are not cut by degree; drop --mp"),
        ({"mp": 9}, "9 ranks for model gqa with 8 attention heads: use between 1 and 8 ranks"),
    ],
)
def test_degrees(models: dict[str, Path], tmp_path: Path, more: dict[str, Any], words: str) -> None:
    assert refusal(models["meta"], tmp_path / "out", **more) == words


@pytest.mark.parametrize("more", [{"mp": None, "format": "hf"}, {"mp": 1, "format": "hf"}, {"mp": 8}, {"mp": 1}])
@pytest.mark.parametrize("kind", ["meta", "hf", "gguf"])
def test_what_is_right(models: dict[str, Path], tmp_path: Path, kind: str, more: dict[str, Any]) -> None:
    asked = flags(models[kind], tmp_path / "out", **more)
    checkpoint = check_request(asked)
    assert checkpoint.kind == kind and not is_finished(asked, checkpoint)
    (tmp_path / "out").mkdir()
    assert not is_finished(asked, check_request(asked))
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


# ---- places ----------------------------------------------------------------------------------------------------


def test_no_input(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint" in refusal(tmp_path / "empty", tmp_path / "out")


def test_no_parent(source: Path, tmp_path: Path) -> None:
    parent = tmp_path / "there is" / "none"
    said = refusal(source, parent / "out")
    assert said == f"--output {parent / 'out'}: there is no folder {parent}; make it: mkdir -p '{parent}'"
    (tmp_path / "file").write_text("")
    assert f"there is no folder {tmp_path / 'file'}" in refusal(source, tmp_path / "file" / "out")


def test_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for overwrite in (False, True):
        assert "out is a file; give a folder" in refusal(source, tmp_path / "out", overwrite=overwrite)
    (tmp_path / "loop").symlink_to("loop")
    assert "loop is a file; give a folder" in refusal(source, tmp_path / "loop")


def test_a_link_into_nothing(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "none" / "below")
    assert f"there is no folder {tmp_path / 'none'}" in refusal(source, tmp_path / "out")
    (tmp_path / "other").symlink_to(tmp_path / "will be")
    asked = flags(source, tmp_path / "other")
    assert not is_finished(asked, check_request(asked))


def test_where_a_disk_is_mounted(source: Path) -> None:
    """It cannot be renamed to: that would be seen after all the work."""
    assert "is where a disk is mounted; give a folder below it: /proc/NAME" in refusal_at_once(source, Path("/proc"))
    assert "is where a disk is mounted" in refusal_at_once(source, Path("/"))


def refusal_at_once(source: Path, output: Path, **more: Any) -> str:
    with pytest.raises(RequestError) as caught:
        check_request(flags(source, output, **more))
    return str(caught.value)


def test_within_one_another(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "below").mkdir()
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "up").symlink_to(tmp_path)
    monkeypatch.chdir(source)
    outputs = [source, source / "out", source / "below" / "out", tmp_path, tmp_path / "link", tmp_path / "link" / "out"]
    outputs += [tmp_path / "up" / "in", Path(), Path(".."), Path("out"), Path("below/..")]
    for output in outputs:
        for given in (source, tmp_path / "link"):
            assert "lie within one another" in refusal_at_once(given, output, overwrite=True), output


@pytest.mark.parametrize("suffix", [".partial", ".replaced"])
def test_the_input_where_the_output_is_at_first_or_what_it_replaces(source: Path, tmp_path: Path, suffix: str) -> None:
    given = source.rename(tmp_path / f"out{suffix}")
    assert "lie within one another" in refusal(given, tmp_path / "out", overwrite=True)
    (tmp_path / "linked").symlink_to(given)
    assert "lie within one another" in refusal(tmp_path / "linked", tmp_path / "out", overwrite=True)


def test_what_the_inputs_links_lead_to_is_input_too(source: Path, tmp_path: Path) -> None:
    """To replace the folder that holds the shards would take them away."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in source.iterdir():
        (linked / file.name).symlink_to(file)
    assert "lie within one another" in refusal(linked, source, overwrite=True)


def test_the_folder_around_a_gguf_file(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file = Path(shutil.copy(models["gguf"], tmp_path / "folder" / "m.gguf"))
    assert "lie within one another" in refusal(file, tmp_path / "folder", overwrite=True)
    assert check_request(flags(file, tmp_path / "folder" / "out")).kind == "gguf"


@pytest.mark.parametrize("name", ["in2", "in.copy", "a 0", "a\n0", "a'; echo foo", "-out"])
def test_names_that_begin_alike_or_are_odd(source: Path, tmp_path: Path, name: str) -> None:
    asked = flags(source, tmp_path / name)
    assert not is_finished(asked, check_request(asked))


def test_beside_the_folder_one_is_in(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in (Path(), Path("out"), Path("../out"), Path("out/")):
        asked = flags(Path("../in"), output)
        assert not is_finished(asked, check_request(asked))


# ---- not empty -------------------------------------------------------------------------------------------------


def test_something_else_is_there(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("mine")
    assert (
        refusal(source, output) == f"--output {output} is not empty: give another folder, or --overwrite to replace it"
    )
    assert f"--overwrite, but {output} is not a checkpoint alone" in refusal(source, output, overwrite=True)


def test_a_checkpoint_with_a_folder_in_it_is_never_replaced(source: Path, tmp_path: Path) -> None:
    for output in (write_meta(tmp_path / "theirs", CONFIG, random_tensors(CONFIG), 1), done(source, tmp_path / "ours")):
        asked = flags(source, output, overwrite=True)
        assert not is_finished(asked, check_request(asked))
        (output / "logs").mkdir()
        assert "is not a checkpoint alone" in refusal(source, output, overwrite=True)


@pytest.mark.parametrize("manifest", ['{"name": "my page", "files": {}}', '{"tool": "webpack"}', '{"tool": null}', "{"])
def test_the_manifest_of_something_else_is_no_permission(source: Path, tmp_path: Path, manifest: str) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "index.html").write_text("mine")
    (output / "manifest.json").write_text(manifest)
    assert "is not a checkpoint alone" in refusal(source, output, overwrite=True)


@pytest.mark.parametrize("kind", ["meta", "hf", "gguf"])
def test_any_checkpoint_may_be_replaced(source: Path, models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    model = models[kind] if models[kind].is_dir() else models[kind].parent
    output = Path(shutil.copytree(model, tmp_path / "out"))
    asked = flags(source, output, overwrite=True)
    assert not is_finished(asked, check_request(asked))
    assert "is not empty" in refusal(source, output)


def test_a_damaged_checkpoint_of_ours_may_be_replaced(source: Path, tmp_path: Path) -> None:
    output = done(source, tmp_path / "out")
    (output / "consolidated.02.pth").unlink()
    asked = flags(source, output, overwrite=True)
    assert not is_finished(asked, check_request(asked))


# ---- finished --------------------------------------------------------------------------------------------------


def finished(source: Path, output: Path, **more: Any) -> bool:
    asked = flags(source, output, **more)
    return is_finished(asked, check_request(asked))


def test_the_same_request_is_finished(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = done(source, tmp_path / "out")
    assert finished(source, output) and finished(source, output, check=True)
    assert not finished(source, output, overwrite=True)
    (tmp_path / "link").symlink_to(output)
    monkeypatch.chdir(tmp_path)
    assert finished(Path("in"), Path("link")) and finished(Path("in/"), Path("out/"))


@pytest.mark.parametrize("more", [{"mp": 2}, {"dtype": "bf16"}, {"format": "hf", "mp": None}])
def test_another_request_is_not(source: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    assert "is not empty" in refusal(source, done(source, tmp_path / "out"), **more)


def test_another_input_is_not(source: Path, tmp_path: Path) -> None:
    output = done(source, tmp_path / "out")
    content = bytearray((source / "consolidated.01.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (source / "consolidated.01.pth").write_bytes(content)
    assert "is not empty" in refusal(source, output)


def test_a_copy_of_the_input_is_the_same_request(source: Path, tmp_path: Path) -> None:
    output = done(source, tmp_path / "out")
    assert finished(Path(shutil.copytree(source, tmp_path / "copy")), output)


@pytest.mark.parametrize("change", ["cut", "longer", "missing", "a folder"])
@pytest.mark.parametrize("name", ["consolidated.03.pth", "params.json"])
def test_sizes_that_are_not_right(source: Path, tmp_path: Path, name: str, change: str) -> None:
    output = done(source, tmp_path / "out")
    file = output / name
    if change in ("missing", "a folder"):
        file.unlink()
    if change == "a folder":
        file.mkdir()
    if change in ("cut", "longer"):
        os.truncate(file, file.stat().st_size + (1 if change == "longer" else -1))
    assert "is not empty: give another folder, or --overwrite" in refusal(source, output)


@pytest.mark.parametrize(
    "files",
    [
        None,
        [],
        {},
        7,
        {"a": 7},
        {"a": {}},
        {"a": {"bytes": "7"}},
        {"a": {"bytes": True, "sha256": "0" * 64}},
        {"../in/params.json": {"bytes": 1, "sha256": "0" * 64}},
        {"consolidated.00.pth": {"bytes": 5, "tensors": [], "rest_sha256": ""}},
    ],
    ids=repr,
)
def test_a_damaged_manifest_is_not_finished(source: Path, tmp_path: Path, files: Any) -> None:
    output = done(source, tmp_path / "out")
    manifest = json.loads((output / "manifest.json").read_bytes())
    (output / "manifest.json").write_text(json.dumps(manifest | {"files": files}))
    assert "is not empty" in refusal(source, output)
    del manifest["files"]
    (output / "manifest.json").write_text(json.dumps(manifest))
    assert "is not empty" in refusal(source, output)


@pytest.mark.parametrize("content", [b"", b"\0" * 50, b"\xff", b"[]", b"7", b"null", b"[" * 99999, b'{"tool": "llama'])
def test_a_manifest_that_is_none(source: Path, tmp_path: Path, content: bytes) -> None:
    output = done(source, tmp_path / "out")
    (output / "manifest.json").write_bytes(content)
    assert "is not empty" in refusal(source, output)
    assert not finished(source, output, overwrite=True)  # its files are a checkpoint still


# ---- the request -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["meta", "hf", "gguf"])
def test_a_request_is_json_and_says_what_decides_the_bytes(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    def asked(source: Path = models[kind], **more: Any) -> dict[str, Any]:
        request = flags(source, tmp_path / "out", **more)
        found = request_of(request, check_request(request))
        assert json.loads(json.dumps(found)) == found
        return found

    requests = [asked(), asked(mp=2), asked(dtype="fp16"), asked(mp=None, format="hf")]
    requests += [asked(source) for other, source in models.items() if other != kind]
    assert len({json.dumps(request) for request in requests}) == 6
    assert asked(mp=1, format="hf") == asked(mp=None, format="hf")
    assert asked(overwrite=True, check=True, dry_run=True) == asked()


def test_the_tokenizer_and_the_header_are_part_of_it(source: Path, tmp_path: Path) -> None:
    def asked() -> dict[str, Any]:
        request = flags(source, tmp_path / "out")
        return request_of(request, check_request(request))

    found = [asked()]
    for name, more in (("tokenizer.model", b"\0"), ("params.json", b" ")):
        (source / name).write_bytes((source / name).read_bytes() + more)
        found.append(asked())
    (source / "tokenizer.model").unlink()
    found.append(asked())
    assert len({json.dumps(request) for request in found}) == 4


# ---- torch -----------------------------------------------------------------------------------------------------

COMMAND = """
import sys
from pathlib import Path
from llama_mp.errors import RequestError
from llama_mp.reshard_request import ReshardFlags, check_request, is_finished

source, output = map(Path, sys.argv[1:])
for place, more in ((source / "out", {}), (output, {"mp": 99}), (output, {}), (output, {"overwrite": True})):
    try:
        flags = ReshardFlags(input=source, output=place, **({"mp": 4} | more))
        print(is_finished(flags, check_request(flags)))
    except RequestError as error:
        print(type(error).__name__)
sys.exit("torch" in sys.modules)
"""


def test_all_this_needs_no_torch(source: Path, tmp_path: Path) -> None:
    output = done(source, tmp_path / "out")
    command = [sys.executable, "-c", COMMAND, source, output]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.split() == ["RequestError", "RequestError", "True", "False"]


def test_no_permission_to_look(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error with the path in it, which becomes one line."""
    (tmp_path / "out").mkdir()
    iterdir = Path.iterdir

    def closed(path: Path) -> Any:
        if path == tmp_path / "out":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", closed)
    asked = flags(source, tmp_path / "out")
    checkpoint: Checkpoint = check_request(asked)
    with pytest.raises(PermissionError) as caught:
        is_finished(asked, checkpoint)
    assert caught.value.filename == str(tmp_path / "out")


def test_a_changed_chat_template_is_another_request(tmp_path: Path, tiny: Path) -> None:
    source = shutil.copytree(tiny, tmp_path / "source")
    flags = ReshardFlags(input=source, output=tmp_path / "out", mp=1)
    before = request_of(flags, check_request(flags))
    assert request_of(flags, check_request(flags)) == before
    (source / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert request_of(flags, check_request(flags)) != before
