"""The benchmark of a GPU, without one: what it asks for, what it makes of the answers, and the world of one rank."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from running import ROOT, run

from llama_mp.errors import RequestError, RunError

BENCHMARKS = ROOT / "benchmarks"
GIB = 2**30
TOKENS_PER_S = {"none": 200.0, "int8": 320.0, "int4": 360.0}
LINES = {
    "ceiling": {
        "device": "Some Card",
        "device_memory_bytes": 80 * GIB,
        "versions": {"cuda": "13.0"},
        "read_gb_per_s": 3000.0,
        "gb_per_s": {"sum": 3000.0, "copy": 2900.0},
    },
    "products": {"products_s": 0.045, "products_tflops": 650.0},
    "share": {"tpot_s": 0.00125, "decode_tokens_per_s": 800.0},
    "layers": {"1_rows": 0.97, "2048_rows": 1.02},
    "kernels": {"busy_us": 4500.0, "launches": 300.0, "kernels": [["product", 4000.0, 129.0], ["attend", 500.0, 32.0]]},
    "gpt_fast": {"decode_tokens_per_s": 190.0, "prefill_tokens_per_s": 9000.0, "ready_s": 100.0},
    "hugging_face": {"decode_tokens_per_s": 100.0, "prefill_tokens_per_s": 8000.0, "ready_s": 60.0},
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


class Processes:
    """In their place: what was asked, and an answer to it. `failing`: a word of those that fail."""

    def __init__(self, failing: str = "nothing") -> None:
        self.asked: list[list[str]] = []
        self.failing = failing

    def __call__(self, script: Path, words: list[str], folder: Path | None) -> dict[str, Any]:
        self.asked.append([script.name, *words])
        if self.failing in words:
            raise RunError(f"{self.failing} failed")
        return LINES[words[0]] if script.name != "bench.py" else of_bench(words)


def of_bench(words: list[str]) -> dict[str, Any]:
    rate = TOKENS_PER_S[words[words.index("--quant") + 1] if "--quant" in words else "none"]
    return {
        "decode_tokens_per_s": rate,
        "tpot_s": 1 / rate,
        "prefill_tokens_per_s": 40000.0,
        "achieved_gb_per_s": 2500.0,
        "ceiling_gb_per_s": 3200.0,
        "peak_memory_bytes": 7 * GIB,
        "planned_memory_bytes": round(7 * GIB * 1.01),
    }


def measured(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, processes: Processes, **flags: Any
) -> tuple[int, dict[tuple[str, str], bool | None]]:
    """Exit code, and of each figure whether its target is met."""
    monkeypatch.setattr(importlib.import_module("gpu_runs"), "last_line", processes)
    said: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *texts, **_: said.append(" ".join(map(str, texts))))
    code = gpu.main(gpu.GpuFlags(size=("7B",), device="cpu", **flags))
    monkeypatch.undo()
    return code, {(goal["case"], goal["name"]): goal["met"] for goal in json.loads(said[-1])["goals"]}


def test_each_target_is_told_beside_its_figure(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "generate.py").touch()
    code, met = measured(gpu, monkeypatch, Processes(), gpt_fast=tmp_path, out=tmp_path / "out")
    assert code == 0
    assert {key: value for key, value in met.items() if value is not None} == {
        ("7B bf16", "of the read rate"): False,  # of the 3200 that the run itself saw
        ("7B int8", "tokens/s to bf16's"): True,
        ("7B int4", "tokens/s to bf16's"): False,
        ("7B prompt of 2048", "of cuBLAS's rate on the same shapes"): True,
        ("7B batch 64", "of the read rate"): True,
        ("7B batch 128", "of the read rate"): True,
        ("7B one rank of 8", "step to that of MP 1"): True,
        ("7B parallel layers", "1 rows, time to Linear's"): True,
        ("7B parallel layers", "2048 rows, time to Linear's"): False,
        ("13B bf16", "error of the planned peak"): True,
        ("33B bf16", "error of the planned peak"): True,
        ("65B bf16 quant int8", "error of the planned peak"): True,
        ("7B bf16 offload cpu device_memory_gib 8", "error of the planned peak"): True,
        ("7B bf16 offload cpu device_memory_gib 8", "peak, of the budget"): True,
        ("7B bf16 offload cpu device_memory_gib 16", "error of the planned peak"): True,
        ("7B bf16 offload cpu device_memory_gib 16", "peak, of the budget"): True,
        ("7B gpt-fast bf16", "our tokens/s to theirs"): True,
    }
    lines = [json.loads(line) for line in (tmp_path / "out" / "gpu.jsonl").read_text().splitlines()]
    [large] = [line for line in lines if line["case"] == "65B bf16"]
    assert large["remarks"] == ["not run: takes 123 GiB, the card has 80"] and not large["goals"]
    assert all(line["device"] == "Some Card" and line["versions"]["cuda"] == "13.0" for line in lines)


def test_what_was_asked_once_is_not_asked_again(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    processes = Processes()
    measured(gpu, monkeypatch, processes, out=tmp_path, parts="decode,quant,share,peers")
    assert len({tuple(words) for words in processes.asked}) == len(processes.asked)
    recorded = [words for words in processes.asked if "--record" in words]
    assert [words[words.index("--quant") + 1] if "--quant" in words else "none" for words in recorded] == [
        "none",
        "int8",
        "int4",
    ]


def test_a_case_that_fails_loses_no_other(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    processes = Processes(failing="int8")
    code, met = measured(gpu, monkeypatch, processes, out=tmp_path, parts="quant,batch")
    assert code == 1
    assert {case for case, _ in met} == {"7B int4", "7B batch 64", "7B batch 128"}
    cases = [json.loads(line)["case"] for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert cases == ["7B int4", "7B batch 64", "7B batch 128"]


def test_a_process_that_fails_says_why_and_leaves_the_rest_in_a_log(gpu: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text("import sys\nprint('{}')\nsys.exit('first\\nerror: the last word')")
    last_line = importlib.import_module("gpu_runs").last_line
    with pytest.raises(RunError, match=r"^failing\.py --some word: error: the last word$"):
        last_line(script, ["--some", "word"], tmp_path / "out")
    assert (tmp_path / "out" / "errors.log").read_text() == "failing.py --some word\nfirst\nerror: the last word\n\n"


def test_what_a_process_says_beside_its_answer_is_not_lost(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "slower.py"
    script.write_text("import sys\nprint('no CUDA graphs', file=sys.stderr)\nprint('{\"tpot_s\": 1}')")
    assert importlib.import_module("gpu_runs").last_line(script, [], tmp_path) == {"tpot_s": 1}
    assert capsys.readouterr().err == "slower.py : no CUDA graphs\n"
    assert (tmp_path / "errors.log").read_text() == "slower.py \nno CUDA graphs\n\n"


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ({"parts": "decode,prefil"}, "unknown prefil; valid: decode, quant, prefill"),
        ({"gpt_fast": Path("/dev")}, "no generate.py there"),
        ({"device": "cuda"}, "no CUDA device answers"),
    ],
)
def test_a_wrong_request_is_refused(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], error: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RequestError, match=error):
        gpu.GpuFlags(**{"device": "cpu"} | flags)


@pytest.mark.slow
def test_one_rank_of_eight_takes_its_steps_alone() -> None:
    wanted = {"device": "cpu", "size": "smollm2-135m", "mp": 8, "prompt_len": 4, "gen_len": 2}
    done = run(sys.executable, BENCHMARKS / "gpu_side.py", "share", json.dumps(wanted))
    assert done.code == 0, done.stderr
    assert "over 8 ranks" in done.stderr
    assert json.loads(done.stdout)["tpot_s"] > 0


@pytest.mark.slow
def test_parts_run_on_a_cpu(tmp_path: Path) -> None:
    flags = ("--device", "cpu", "--size", "smollm2-135m", "--prompt_len", "8", "--gen_len", "4", "--prefill_len", "16")
    parts = ("--parts", "decode,prefill,share,kernels,peers")
    done = run(sys.executable, BENCHMARKS / "gpu.py", *flags, *parts, "--out", tmp_path, timeout=600)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == []
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {line["part"] for line in lines} == set(parts[1].split(","))
    assert all(line["goals"] for line in lines if not line["remarks"])
    assert len(list((tmp_path / "runs").iterdir())) == 1
