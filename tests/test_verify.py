"""The verb verify: each way in which a checkpoint is not whole, named by file and tensor; whole ones of each kind."""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import (
    MODELS,
    VOCAB_SIZE,
    hf_cache,
    hugging_face,
    meta_tensors,
    random_tensors,
    write_gguf,
    write_hf,
    write_meta,
)
from gguf.constants import GGMLQuantizationType
from manifests import exchange, flip, ranges_of, write_manifest
from running import ROOT, run
from safetensors.torch import load_file, save_file

from llama_mp import progress
from llama_mp.checkpoint import scan
from llama_mp.checkpoint.verify import Report, VerifyFlags, verify
from llama_mp.errors import RequestError
from llama_mp.layout import global_shapes, shards

VERIFY = ROOT / "launch" / "verify.py"
GQA, PADDED = MODELS["gqa"], MODELS["heads-9-3"]
WK, NORM = "layers.1.attention.wk.weight", "layers.0.ffn_norm.weight"


def checked(path: Path, **flags: object) -> Report:
    return verify(VerifyFlags(path=path, **flags))


def faults(path: Path) -> list[str]:
    return list(map(str, checked(path).check.faults))


def whole_line(path: Path, **flags: object) -> str:
    report = checked(path, **flags)
    assert report.failure is None, report.lines
    [line] = report.lines
    assert json.loads(report.as_json)["whole"] is True
    return line


def change(folder: Path, rank: int, name: str, place: object, value: float) -> None:
    """Put `value` into a tensor of one shard."""
    file = folder / f"consolidated.{rank:02d}.pth"
    tensors = torch.load(file, weights_only=True)
    tensors[name][place] = value
    torch.save(tensors, file)


def meta(folder: Path, mp: int, config: object = GQA) -> Path:
    return write_meta(folder, config, random_tensors(config), mp)


# ---- structure -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", ["mha", "gqa", "heads-9-3"])
def test_whole_meta_folders(tmp_path: Path, name: str, mp: int) -> None:
    folder = meta(tmp_path, mp, MODELS[name])
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.pth"))
    num_tensors = 20 if MODELS[name].tied_embeddings else 21
    assert whole_line(folder) == (
        f"{folder} is whole: {mp} file{'s' if mp > 1 else ''}, {num_tensors} tensors, {num_bytes} bytes; "
        "shapes, copies, padding and finite values; no manifest.json or checklist.chk is there"
    )


@pytest.mark.parametrize("kind", ["hf", "cache", "gguf file", "gguf folder"])
def test_whole_checkpoints_of_other_kinds(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m"
    if "gguf" in kind:
        path.mkdir()
        config = replace(MODELS["tied"], hidden_dim=96)  # whole blocks
        file = write_gguf(path / "m.gguf", config, random_tensors(config), GGMLQuantizationType.Q8_0)
        path = file if kind == "gguf file" else path
    else:
        write_hf(path, hugging_face(MODELS["tied"]), "100KB")
        path = hf_cache(path, tmp_path / "models--x--y") if kind == "cache" else path
    assert "is whole: " in whole_line(path) and ", 20 tensors, " in whole_line(path)


def test_rope_freqs_are_ignored(tmp_path: Path) -> None:
    folder = meta(tmp_path, 2)
    for rank in range(2):
        file = folder / f"consolidated.{rank:02d}.pth"
        torch.save(torch.load(file) | {"rope.freqs": torch.tensor([1.0, rank, float("nan")])}, file)
    whole_line(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("chunk_elements", [100, 1 << 20])
def test_values_that_are_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, chunk_elements: int
) -> None:
    monkeypatch.setattr(scan, "CHUNK_ELEMENTS", chunk_elements)
    folder = meta(tmp_path, 2)
    change(folder, 1, "layers.1.feed_forward.w2.weight", (slice(50, 52), 40), value)
    assert faults(folder) == [
        f"consolidated.01.pth: layers.1.feed_forward.w2.weight: 2 not finite, the first at [50, 40]: {value}"
    ]


def test_values_that_are_not_finite_in_safetensors(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, hugging_face(GQA).bfloat16(), "60KB")
    name = "model.layers.1.self_attn.q_proj.weight"
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][9, 3] = float("nan")
    save_file(tensors, file)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert faults(folder) == [f"{file.name}: {name}: 1 not finite, the first at [9, 3]: nan"]


def test_values_that_are_not_finite_in_gguf(tmp_path: Path) -> None:
    config = replace(MODELS["tied"], hidden_dim=96)
    tensors = random_tensors(config)
    tensors["norm.weight"][5] = float("inf")
    tensors["layers.1.feed_forward.w2.weight"][3, 40] = float("inf")
    with np.errstate(invalid="ignore"):
        file = write_gguf(tmp_path / "m.gguf", config, tensors, GGMLQuantizationType.Q8_0)
    first, second = sorted(faults(file))
    assert first.startswith("m.gguf: blk.1.ffn_down.weight: 32 not finite, the first at [3, 32]: ")
    assert second == "m.gguf: output_norm.weight: 1 not finite, the first at [5]: inf"


@pytest.mark.parametrize(("mp", "rank", "usual"), [(2, 1, 0), (4, 0, 1), (4, 2, 0)])
def test_a_norm_that_is_not_that_of_the_other_shards(tmp_path: Path, mp: int, rank: int, usual: int) -> None:
    folder = meta(tmp_path, mp)
    change(folder, rank, NORM, 63, 5.0)
    assert faults(folder) == [
        f"consolidated.{rank:02d}.pth: {NORM}: rows 0 to 63 of the whole tensor differ from those in "
        f"consolidated.{usual:02d}.pth"
    ]


@pytest.mark.parametrize("chunk_elements", [100, 1 << 20])
def test_copies_of_a_kv_head_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_elements: int) -> None:
    monkeypatch.setattr(scan, "CHUNK_ELEMENTS", chunk_elements)
    folder = meta(tmp_path, 8)  # 2 KV heads, each in four shards
    change(folder, 6, WK, (7, 63), 5.0)
    assert faults(folder) == [
        f"consolidated.06.pth: {WK}: rows 8 to 15 of the whole tensor differ from those in consolidated.04.pth"
    ]


def test_two_shards_exchanged_within_the_copies_of_a_head_are_found_by_their_queries_alone(tmp_path: Path) -> None:
    """Without digests nothing tells: the other way to know is a manifest."""
    folder = meta(tmp_path, 4)
    exchange(folder / "consolidated.00.pth", folder / "consolidated.01.pth")
    assert faults(folder) == []
    exchange(folder / "consolidated.00.pth", folder / "consolidated.02.pth")
    assert {line.split(": ")[1].split(".")[3] for line in faults(folder)} == {"wk", "wv"}


@pytest.mark.parametrize(
    ("mp", "rank", "name", "place"),
    [
        (2, 1, "layers.0.attention.wq.weight", (47, 5)),  # the second rank's second KV group is padding
        (2, 1, "layers.0.attention.wv.weight", (8, 0)),
        (2, 1, "layers.1.attention.wo.weight", (71, 24)),
        (2, 1, "output.weight", (165, 3)),
        (4, 3, "layers.0.feed_forward.w2.weight", (0, 22)),
        (4, 3, "layers.0.feed_forward.w1.weight", (21, 71)),
    ],
)
@pytest.mark.parametrize("chunk_elements", [100, 1 << 20])
def test_padding_that_is_not_zero(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mp: int,
    rank: int,
    name: str,
    place: tuple[int, int],
    chunk_elements: int,
) -> None:
    monkeypatch.setattr(scan, "CHUNK_ELEMENTS", chunk_elements)
    config = replace(PADDED, tied_embeddings=False)
    folder = meta(tmp_path, mp, config)
    assert config.vocab_size == VOCAB_SIZE == 331
    change(folder, rank, name, place, 1e-30)
    assert faults(folder) == [
        f"consolidated.{rank:02d}.pth: {name}: 1 not zero in the padding, the first at {list(place)}"
    ]


def test_regions_that_several_files_hold_are_the_same_regions() -> None:
    """What the check of copies relies on: no two placements of a layout overlap in part."""
    for config in MODELS.values():
        for mp in range(1, config.num_heads + 1):
            held: dict[tuple, int] = {}
            for rank in range(mp):
                for shard in shards(config, rank, mp).values():
                    for p in shard.placements:
                        held[p.source, p.rows, p.cols] = len(p.rows) * len(p.cols)
            whole = random_tensors(config)
            for name, tensor in whole.items():
                assert sum(size for (source, *_), size in held.items() if source == name) == tensor.numel()


# ---- what cannot be opened -------------------------------------------------------------------------------------


def test_every_file_that_is_not_whole_is_named(tmp_path: Path) -> None:
    folder = meta(tmp_path, 4)
    os.truncate(folder / "consolidated.01.pth", 20_000)
    (folder / "consolidated.03.pth").write_bytes(b"<html>")
    first, second = faults(folder)
    assert first.startswith("consolidated.01.pth: is not a whole torch file (")
    assert second.startswith("consolidated.03.pth: is no file of torch.save")


def test_safetensors_and_gguf_cut_short(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", hugging_face(GQA), "100KB")
    files = sorted(folder.glob("*.safetensors"))
    for file in files[1:]:
        os.truncate(file, file.stat().st_size - 1)
    assert [line.split(" (")[0] for line in faults(folder)] == [
        f"{file.name}: is not a whole safetensors file" for file in files[1:]
    ]
    file = write_gguf(tmp_path / "m.gguf", MODELS["tied"], random_tensors(MODELS["tied"]), GGMLQuantizationType.F16)
    os.truncate(file, file.stat().st_size - 100)
    [line] = faults(file)
    assert line.startswith("m.gguf: is not a whole GGUF file (tensor ")


def test_wrong_shapes_and_names_are_a_line_each(tmp_path: Path) -> None:
    folder = meta(tmp_path / "m", 2)
    file = folder / "consolidated.01.pth"
    tensors = torch.load(file, weights_only=True)
    torch.save(tensors | {name: tensors[name][:-1].clone() for name in (WK, NORM)}, file)
    assert sorted(faults(folder)) == [
        f"consolidated.01.pth: {NORM}: has shape (63,), not (64,)",
        f"consolidated.01.pth: {WK}: has shape (7, 64), not (8, 64)",
    ]
    del tensors[NORM]
    torch.save(tensors | {"x.bias": torch.ones(2)}, file)
    assert faults(folder) == [
        f"consolidated.01.pth: {NORM}: is missing here, but in consolidated.00.pth",
        "consolidated.01.pth: x.bias: is not in consolidated.00.pth",
    ]
    for rank in range(2):
        torch.save(tensors | {"x.bias": torch.ones(2)}, folder / f"consolidated.{rank:02d}.pth")
    assert faults(folder) == [f"m: {NORM}: is missing", "m: x.bias: is unknown"]


def test_a_wrong_shape_in_safetensors_names_its_file_and_its_own_name(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "m", hugging_face(GQA), "100KB")
    name = "model.layers.1.mlp.down_proj.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / index[name]
    tensors = load_file(file)
    tensors[name] = tensors[name][:, 1:].clone()
    save_file(tensors, file)
    assert faults(folder) == [f"{file.name}: {name}: has shape (64, 89), not (64, 90)"]


@pytest.mark.parametrize(("dropped", "text"), [(0, "lacks consolidated.00.pth of 4 shards"), (3, "of 4 shards, and 3")])
def test_a_dropped_shard_is_one_line(tmp_path: Path, dropped: int, text: str) -> None:
    folder = meta(tmp_path / "m", 4)
    (folder / f"consolidated.{dropped:02d}.pth").unlink()
    [line] = faults(folder)
    assert line.startswith("m: ") and text in line


def test_what_belongs_to_it_is_missing(tmp_path: Path) -> None:
    folder = meta(tmp_path / "m", 2)
    (folder / "params.json").rename(tmp_path / "params.json")
    [line] = faults(folder)
    assert line.startswith("m: lacks params.json")
    (folder / "params.json").write_text("{")
    [line] = faults(folder)
    assert line.startswith("m: params.json is not JSON")
    folder = write_hf(tmp_path / "hf", hugging_face(GQA), "100KB")
    [first, *_] = sorted(folder.glob("*.safetensors"))
    first.unlink()
    [line] = faults(folder)
    assert line.startswith(f"hf: lacks {first.name} of the ")


@pytest.mark.parametrize("content", [None, "empty", "x.bin", "x.txt"])
def test_no_checkpoint_at_all_is_a_wrong_request(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "m"
    if content:
        path.mkdir()
    if content and content != "empty":
        path = path / content
        path.write_text("x")
    with pytest.raises(RequestError, match=r"check the path|give the folder"):
        checked(path)


# ---- checklist -------------------------------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    folder = meta(tmp_path / "m", 3)
    names = [*(f"consolidated.{rank:02d}.pth" for rank in range(3)), "params.json"]
    sums = [f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "checklist.chk").write_text("".join(sums))
    return folder


def test_a_whole_folder_by_its_checklist(listed: Path) -> None:
    assert ", 4 files" not in whole_line(listed) and "is whole: 4 files, " in whole_line(listed)
    assert whole_line(listed).endswith(" bytes; MD5 as in checklist.chk")


def test_files_that_the_checklist_does_not_describe(listed: Path) -> None:
    flip(listed / "consolidated.02.pth", 3000)
    flip(listed / "params.json", 0)
    (listed / "consolidated.01.pth").unlink()
    shutil.copy(listed / "consolidated.00.pth", listed / "consolidated.03.pth")
    assert sorted(faults(listed)) == [
        "consolidated.01.pth: is missing",
        "consolidated.02.pth: MD5 differs from that in checklist.chk",
        "consolidated.03.pth: is not in checklist.chk",
        "params.json: MD5 differs from that in checklist.chk",
    ]


def test_shards_exchanged_against_the_checklist(listed: Path) -> None:
    exchange(listed / "consolidated.00.pth", listed / "consolidated.02.pth")
    assert faults(listed) == [
        "consolidated.00.pth: MD5 differs from that in checklist.chk: it is that of consolidated.02.pth",
        "consolidated.02.pth: MD5 differs from that in checklist.chk: it is that of consolidated.00.pth",
    ]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("0" * 31 + "  params.json", "line 5 is not an MD5 and a file's name"),
        ("0" * 32 + "  ../params.json", "line 5 is not an MD5 and a file's name"),
        ("<html>", "line 5 is not an MD5 and a file's name"),
        ("0" * 32 + "  params.json", "line 5 names params.json with another MD5 than before"),
    ],
)
def test_a_checklist_that_is_none(listed: Path, line: str, text: str) -> None:
    with (listed / "checklist.chk").open("a") as file:
        file.write(f"{line}\n")
    assert faults(listed) == [f"checklist.chk: {text}"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\0"])
def test_a_checklist_without_a_line(listed: Path, content: bytes) -> None:
    (listed / "checklist.chk").write_bytes(content)
    [line] = faults(listed)
    assert line.startswith("checklist.chk: ")


# ---- the verb --------------------------------------------------------------------------------------------------


def test_a_manifest_goes_before_a_checklist(listed: Path) -> None:
    (listed / "checklist.chk").write_text("nonsense\n")
    write_manifest(listed)
    assert whole_line(listed).endswith("; SHA-256 as in manifest.json")
    assert ": 5 files, 63 tensors, " in whole_line(listed)


def test_against_another_degree_and_format(tmp_path: Path) -> None:
    model = hugging_face(GQA)
    folder = write_meta(tmp_path / "m", GQA, meta_tensors(model), 3)
    other = write_hf(tmp_path / "hf", model)
    assert whole_line(folder, against=other).endswith(f"; equal to {other} in every value")
    change(folder, 2, "output.weight", (0, 0), 7.0)
    report = checked(folder, against=other)
    [line] = report.lines
    assert line.startswith("output.weight: 1 of 21184 elements differ, the first at [222, 0], 7.0, not ")
    assert report.failure == f"1 difference from {other}: keep the one that you trust"
    assert json.loads(report.as_json) == {
        "path": str(folder),
        "method": "structure",
        "whole": True,
        "faults": [],
        "against": str(other),
        "differences": [{"tensor": "output.weight", "difference": line.removeprefix("output.weight: ")}],
    }


def test_against_when_one_of_the_two_cannot_be_opened(tmp_path: Path) -> None:
    folder, other = meta(tmp_path / "m", 2), meta(tmp_path / "other", 1)
    os.truncate(folder / "consolidated.01.pth", 100)
    report = checked(folder, against=other)
    first, second = report.lines
    assert first.startswith("consolidated.01.pth: is not a whole")
    assert second.startswith(f"not compared: {folder}/consolidated.01.pth is not a whole")
    assert report.failure == f"1 fault in {folder} and 1 difference from {other}: get what is named again"
    with pytest.raises(RequestError, match=r"consolidated.01.pth is not a whole"):
        checked(other, against=folder)
    with pytest.raises(RequestError, match="no such folder"):
        checked(other, against=tmp_path / "nowhere")


def test_every_method_says_how_far_it_is(
    listed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)

    def lines_of_a_check(**flags: object) -> tuple[int, int]:
        whole_line(listed, **flags)
        out, err = capsys.readouterr()
        counts = err.count("checking: "), err.count("comparing: ")
        assert out == "" and err.count("\n") == sum(counts)
        return counts

    assert lines_of_a_check(against=listed) == (4, 21)  # files; tensors
    (listed / "checklist.chk").unlink()
    assert lines_of_a_check() == (3 * 21, 0)  # each shard's tensors
    write_manifest(listed)
    assert lines_of_a_check() == (3 * (21 + 1) + 1, 0)  # and what lies around them; params.json


HOLDS_LITTLE = """
import json, sys, threading, time
from pathlib import Path
import torch
from llama_mp.checkpoint.verify import VerifyFlags, verify

def private_bytes():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024

def sample():
    while not done.is_set():
        samples.append(private_bytes())
        time.sleep(0.001)

baseline, samples, done = private_bytes(), [], threading.Event()
sampler = threading.Thread(target=sample)
sampler.start()
report = verify(VerifyFlags(path=Path(sys.argv[1]), against=Path(sys.argv[2])))
done.set()
sampler.join()
print(json.dumps({"failure": report.failure, "peak": max(samples) - baseline, "num_samples": len(samples)}))
"""


def test_little_memory_is_held_whatever_the_size(tmp_path: Path) -> None:
    """Private memory, because the mapped files' pages are the kernel's to drop."""
    config = replace(MODELS["mha"], dim=2048, head_dim=256, hidden_dim=5632, num_layers=3, vocab_size=16000)
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in global_shapes(config).items()}
    one, three = (write_meta(tmp_path / str(mp), config, tensors, mp) for mp in (1, 3))
    command = [sys.executable, "-c", HOLDS_LITTLE, one, three]
    measured = json.loads(run(*command).stdout)
    assert measured["failure"] is None and measured["num_samples"] > 10
    assert measured["peak"] < 100e6 < sum(tensor.nbytes for tensor in tensors.values()) / 3


def test_from_end_to_end(listed: Path) -> None:
    write_manifest(listed)
    done = run(sys.executable, VERIFY, listed)
    assert (done.code, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    assert done.stdout.startswith(f"{listed} is whole: ")
    flip(listed / "consolidated.01.pth", ranges_of(listed / "consolidated.01.pth")[WK][0])
    done = run(sys.executable, VERIFY, "--json", listed)
    told = json.loads(done.stdout)
    assert (done.code, told["method"], told["whole"], told["against"]) == (1, "manifest", False, None)
    assert told["faults"] == [
        {"file": "consolidated.01.pth", "tensor": WK, "fault": "SHA-256 differs from the manifest's"}
    ]
    assert done.error == f"1 fault in {listed}: get what is named again"
    assert run(sys.executable, VERIFY, listed / "nowhere").refusal.endswith("no such folder or file; check the path")


def test_digests_are_checked_without_torch(listed: Path) -> None:
    code = f"import sys; sys.argv = ['verify.py', {str(listed)!r}]\n"
    code += "from llama_mp.checkpoint.verify import VerifyFlags, verify\nfrom pathlib import Path\n"
    code += "print(verify(VerifyFlags(path=Path(sys.argv[1]))).failure, 'torch' in sys.modules)"
    assert run(sys.executable, "-c", code).stdout == "None False\n"
