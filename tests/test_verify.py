"""The verb verify: by which method it judges, Meta's checklists, the comparison, and how the result is told."""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import held
import pytest
import torch
from damage import change, checked, exchange, faults, flip, meta, ranges_of, whole_line, write_manifest
from factory import (
    MODELS,
    hugging_face,
    meta_tensors,
    write_hf,
    write_meta,
)
from ranks import alone
from running import ROOT, run

from llama_mp import progress
from llama_mp.errors import RequestError
from llama_mp.layout import global_shapes

VERIFY = ROOT / "launch" / "verify.py"
GQA, PADDED = MODELS["gqa"], MODELS["heads-9-3"]
WK, NORM = "layers.1.attention.wk.weight", "layers.0.ffn_norm.weight"


# ---- checklist -------------------------------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    folder = meta(tmp_path / "m", 3, GQA)
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
        "logits": None,
    }


def test_against_when_one_of_the_two_cannot_be_opened(tmp_path: Path) -> None:
    folder, other = meta(tmp_path / "m", 2, GQA), meta(tmp_path / "other", 1, GQA)
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


def test_little_memory_is_held_whatever_the_size(tmp_path: Path) -> None:
    """Private memory, because the mapped files' pages are the kernel's to drop."""
    config = replace(MODELS["mha"], dim=1024, head_dim=128, hidden_dim=2816, num_layers=3, vocab_size=16000)
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in global_shapes(config).items()}
    one, three = (write_meta(tmp_path / str(mp), config, tensors, mp) for mp in (1, 3))
    measured = alone(held.verifying, one, three)
    assert measured["failure"] is None and measured["num_samples"] > 10
    assert measured["peak"] < 30e6 < sum(tensor.nbytes for tensor in tensors.values()) / 3


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
