"""A folder and its manifest: every change is found, and named by file and tensor; nothing else is."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from damage import exchange, flip, ranges_of, sha256, write_manifest
from factory import MODELS, hugging_face, random_tensors, write_hf, write_meta

from llama_mp.checkpoint import digests
from llama_mp.checkpoint.fault import Fault
from llama_mp.checkpoint.manifest import check_manifest, digest_range, gaps, rest_digest

DIFFERS = "SHA-256 differs from the manifest's"
OUTSIDE = "SHA-256 of what lies outside its tensors differs from the manifest's"
FIRST = "tok_embeddings.weight"
NUM_OTHERS = 20  # tensors in a shard of two blocks, but the first


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_meta(folder / "meta", MODELS["gqa"], random_tensors(MODELS["gqa"]), 3)
    write_hf(folder / "hf", hugging_face(MODELS["gqa"]), "100KB")
    for kind in ("meta", "hf"):
        write_manifest(folder / kind)
    return folder


@pytest.fixture(params=["meta", "hf"])
def folder(request: pytest.FixtureRequest, written: Path, tmp_path: Path) -> Path:
    """A whole folder to damage: three shards, or several safetensors files."""
    return shutil.copytree(written / request.param, tmp_path / request.param)


@pytest.fixture
def meta(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written / "meta", tmp_path / "meta")


def weights(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if ranges_of(file))


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def check_changed(folder: Path, change: object) -> list[str]:
    """The faults after `change` was made to the manifest."""
    manifest = manifest_of(folder)
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return list(map(str, check_manifest(folder)))


def test_a_whole_folder_has_no_fault(folder: Path) -> None:
    assert len(weights(folder)) > 2
    assert check_manifest(folder) == []


def test_a_byte_in_any_tensor(folder: Path) -> None:
    for file in weights(folder)[:2]:
        for name, (offset, num_bytes) in ranges_of(file).items():
            at = offset + random.Random(name).randrange(num_bytes)
            flip(file, at)
            assert check_manifest(folder) == [Fault(file.name, name, DIFFERS)]
            flip(file, at)
    assert check_manifest(folder) == []


def test_a_byte_anywhere_in_any_file(folder: Path) -> None:
    rng = random.Random(0)
    num_outside = 0
    for file in sorted(folder.iterdir()):
        if file.name == "manifest.json":
            continue
        ranges, size = ranges_of(file), file.stat().st_size
        for at in (0, size - 1, *rng.sample(range(size), 6), *(end for end in [sum(r) for r in ranges.values()][:3])):
            if at == size:
                continue
            flip(file, at)
            [found] = check_manifest(folder)
            flip(file, at)
            hit = [name for name, (offset, num_bytes) in ranges.items() if offset <= at < offset + num_bytes]
            text = DIFFERS if hit or not ranges else OUTSIDE
            assert found == Fault(file.name, hit[0] if hit else None, text)
            num_outside += text == OUTSIDE
    assert num_outside > 2


def test_several_faults_are_several_lines(meta: Path) -> None:
    for rank, name in ((0, "norm.weight"), (2, "layers.1.attention.wk.weight"), (2, "layers.0.ffn_norm.weight")):
        file = meta / f"consolidated.{rank:02d}.pth"
        flip(file, ranges_of(file)[name][0])
    assert sorted(map(str, check_manifest(meta))) == [
        f"consolidated.00.pth: norm.weight: {DIFFERS}",
        f"consolidated.02.pth: layers.0.ffn_norm.weight: {DIFFERS}",
        f"consolidated.02.pth: layers.1.attention.wk.weight: {DIFFERS}",
    ]


def test_a_file_cut_short_is_one_line_with_both_sizes(folder: Path) -> None:
    file = weights(folder)[1]
    size = file.stat().st_size
    for length in (size - 1, size // 2, 0):
        os.truncate(file, length)
        assert list(map(str, check_manifest(folder))) == [
            f"{file.name}: has {length} bytes, not {size} as manifest.json says"
        ]


def test_a_missing_file_and_one_too_many(folder: Path) -> None:
    first, second, *_ = weights(folder)
    stranger = folder / ("consolidated.07.pth" if first.suffix == ".pth" else "adapter.safetensors")
    shutil.copy(second, stranger)
    first.unlink()
    assert check_manifest(folder) == [
        Fault(stranger.name, None, "is not in manifest.json"),
        Fault(first.name, None, "is missing"),
    ]
    first.mkdir()
    assert Fault(first.name, None, "is not a file") in check_manifest(folder)


def test_two_exchanged_shards_are_one_line(meta: Path) -> None:
    exchange(meta / "consolidated.00.pth", meta / "consolidated.02.pth")
    assert list(map(str, check_manifest(meta))) == [
        f"consolidated.00.pth: {FIRST}: is, with {NUM_OTHERS} other tensors, what manifest.json lists for "
        "consolidated.02.pth: the two files are exchanged"
    ]


def test_a_shard_copied_over_another_is_one_line(meta: Path) -> None:
    shutil.copy(meta / "consolidated.01.pth", meta / "consolidated.02.pth")
    assert list(map(str, check_manifest(meta))) == [
        f"consolidated.02.pth: {FIRST}: is, with {NUM_OTHERS} other tensors, what manifest.json lists for "
        "consolidated.01.pth: a copy of consolidated.01.pth lies in its place"
    ]


def test_exchanged_files_of_other_sizes_and_tensors_are_one_line(written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written / "hf", tmp_path / "hf")
    first, *_, last = weights(folder)
    assert first.stat().st_size != last.stat().st_size
    exchange(first, last)
    [fault] = check_manifest(folder)
    assert (fault.file, fault.tensor) == (first.name, next(iter(manifest_of(folder)["files"][first.name]["tensors"])))
    assert fault.text.endswith(f"what manifest.json lists for {last.name}: the two files are exchanged")


def test_a_shard_of_another_model_is_one_line(meta: Path, tmp_path: Path) -> None:
    write_meta(tmp_path / "other", MODELS["gqa"], random_tensors(MODELS["gqa"], seed=1), 3)
    shutil.copy(tmp_path / "other" / "consolidated.01.pth", meta / "consolidated.01.pth")
    assert list(map(str, check_manifest(meta))) == [
        f"consolidated.01.pth: {FIRST}: its SHA-256 and those of the {NUM_OTHERS} other tensors differ from the "
        "manifest's: another file"
    ]


def test_a_file_that_cannot_be_read_is_named(meta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails in the middle of a file; permissions would not keep root out."""
    digest = digests.digest
    place = ranges_of(meta / "consolidated.01.pth")["norm.weight"][0]

    def failing(part: digests.Part, algorithm: str) -> str:
        if part.path.name == "consolidated.01.pth" and part.spans[0][0] == place:
            raise OSError(5, "Input/output error")
        return digest(part, algorithm)

    monkeypatch.setattr(digests, "digest", failing)
    assert list(map(str, check_manifest(meta))) == [
        "consolidated.01.pth: norm.weight: cannot be read: Input/output error"
    ]


# ---- manifests that are none -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'{"files": []}',
        b'{"files": 3}',
        b"{}",
        b"\xff\xfe",
        b"[" * 200_000,
        b"\0" * 99,
    ],
)
def test_what_is_no_manifest_is_one_fault(meta: Path, content: bytes) -> None:
    (meta / "manifest.json").write_bytes(content)
    [fault] = check_manifest(meta)
    assert (fault.file, fault.tensor) == ("manifest.json", None)
    assert "\n" not in str(fault)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a\nb"])
def test_names_that_lead_elsewhere_are_refused(meta: Path, name: str) -> None:
    said = check_changed(meta, lambda m: m["files"].update({name: m["files"].pop("params.json")}))
    assert said == [f"manifest.json: {name!r}: is not the name of a file beside it"]


WRONG_VALUES = {
    "bytes": [-1, 1.5, "7", None, True, 10**30],
    "tensors": [3, [], None, {"x": 3}, {"x": {}}, {"x": {"offset": 1}}],
    "rest_sha256": [None, "", "0" * 63, "G" * 64, 3],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG_VALUES.items() for value in values])
def test_a_wrong_value_is_one_fault(meta: Path, key: str, value: object) -> None:
    [said] = check_changed(meta, lambda m: m["files"]["consolidated.01.pth"].update({key: value}))
    in_manifest = said.startswith("manifest.json: 'consolidated.01.pth': ")
    assert in_manifest or (said.startswith("consolidated.01.pth: has ") and value == 10**30)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"offset": 10**15}, "ends at byte 1000000000000256, the file at "),
        ({"offset": -1}, "-1 is no number of bytes"),
        ({"bytes": "256"}, "'256' is no number of bytes"),
        ({"sha256": "00"}, "'00' is no SHA-256"),
    ],
)
def test_a_place_outside_the_file_is_a_fault_of_the_manifest(meta: Path, change: dict, text: str) -> None:
    [said] = check_changed(meta, lambda m: m["files"]["consolidated.01.pth"]["tensors"]["norm.weight"].update(change))
    assert said.startswith("manifest.json: 'consolidated.01.pth': ") and text in said


def test_entries_of_another_shape_are_faults(meta: Path) -> None:
    for value in (3, None, [], {}, {"sha256": "0" * 64}, {"bytes": 3}, "x"):
        [said] = check_changed(meta, lambda m, value=value: m["files"].update({"params.json": value}))
        assert said.startswith("manifest.json: 'params.json': is not an object with ")


def test_a_wrong_digest_in_the_manifest_is_found(meta: Path) -> None:
    tensor = "layers.0.attention.wo.weight"
    wrong = {"sha256": "0" * 64}
    said = check_changed(meta, lambda m: m["files"]["consolidated.01.pth"]["tensors"][tensor].update(wrong))
    assert said == [f"consolidated.01.pth: {tensor}: {DIFFERS}"]


# ---- digests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [1, 7, 1 << 20])
def test_digests_are_those_of_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(digests, "BLOCK_BYTES", block_bytes)
    file, content = tmp_path / "x", random.Random(0).randbytes(1000)
    file.write_bytes(content)
    for offset, num_bytes in ((0, 1000), (0, 0), (3, 10), (990, 10), (1000, 0)):
        assert digest_range(file, offset, num_bytes) == sha256(content[offset : offset + num_bytes])
    assert rest_digest(file, []) == sha256(content)
    assert rest_digest(file, [(500, 100), (0, 10), (700, 0)]) == sha256(content[10:500] + content[600:])
    assert rest_digest(file, [(0, 1000)]) == sha256(b"")


def test_gaps_join_what_touches_or_overlaps() -> None:
    assert gaps([(5, 5), (10, 2), (11, 4)], 20) == ((0, 5), (15, 20))


def test_progress_ends_with_all_bytes(meta: Path) -> None:
    calls: list[tuple[int, int]] = []
    check_manifest(meta, lambda done, total: calls.append((done, total)))
    total = sum(file.stat().st_size for file in meta.iterdir() if file.name != "manifest.json")
    assert calls[-1] == (total, total)
    assert calls == sorted(calls) and len(calls) > 60
