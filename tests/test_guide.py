"""The hardware guide: in step with the records and the plan, what ran and what would never mixed, one figure always."""

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from running import ROOT, run

from llama_mp import guide
from llama_mp.config import load_size
from llama_mp.errors import RequestError
from llama_mp.memory import Workload, rank_memory

DOCS = ROOT / "docs"
RECORD = {
    "verb": "bench",
    "date": "2026-01-31",
    "size": "13B",
    "weights": "random",
    "mp": 2,
    "dtype": "fp16",
    "quant": "int8",
    "offload": "cpu",
    "device_type": "cuda",
    "device": "NVIDIA X100",
    "device_memory_bytes": 80 * 2**30,
    "batch_size": 4,
    "seq_len": 256,
    "decode_tokens_per_s": 123.456,
    "peak_memory_bytes": 13_210_000_000,
    "planned_memory_bytes": 13_110_000_000,
    "environment": {"kind": "laptop", "cpu": "Some CPU", "cores": 6, "versions": {"python": "3.11", "torch": "2.9"}},
}


def kept(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    file = folder / f"{len(list(folder.iterdir()))}.json"
    file.write_text(json.dumps(RECORD | changes))
    return file


def section(page: str, title: str) -> list[list[str]]:
    """The cells of the table below a title."""
    lines = page.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    return [rows[0], *rows[2:]]


# ---- what is in docs/ ------------------------------------------------------------------------------------------------


def test_the_page_is_in_step_with_the_records_and_the_plan() -> None:
    assert (DOCS / guide.PAGE).read_text() == guide.page(guide.read_records(DOCS / "runs")), "launch/plan.py --guide"


def test_the_figure_is_in_step_with_the_plan() -> None:
    tree = ElementTree.parse(DOCS / guide.FIGURE)
    (said,) = [element.text for element in tree.iter() if element.tag.endswith("}description")]
    assert json.loads(said) == json.loads(guide.described()), "launch/plan.py --guide"


def test_every_record_is_of_a_run_that_the_page_links_to() -> None:
    files = sorted(file.name for file in (DOCS / "runs").iterdir())
    assert files
    assert sorted(re.findall(r"\(runs/(.*?)\)", (DOCS / guide.PAGE).read_text())) == ["", *files]


# ---- what it is made of ----------------------------------------------------------------------------------------------


def test_a_measured_row_tells_the_record(tmp_path: Path) -> None:
    kept(tmp_path)
    heading, row = section(guide.page(guide.read_records(tmp_path)), "Measured")
    assert heading[:8] == ["Model", "MP", "GPU", "VRAM", "Precision", "Environment", "tokens/s", "measured peak"]
    assert row[:4] == ["13B (random weights)", "2", "2 x NVIDIA X100", "80 GiB"]
    assert row[4:8] == ["fp16, weights int8, offload to cpu", "laptop; torch 2.9", "123.5", "13.21 GB"]
    assert row[8:] == ["13.11 GB", "4 x 256", "[bench, 2026-01-31](runs/0.json)"]


def test_a_run_on_a_cpu_and_one_that_decoded_nothing(tmp_path: Path) -> None:
    cpu = {"device_type": "cpu", "device": "Some CPU", "weights": "checkpoint", "quant": "none", "offload": "none"}
    kept(tmp_path, **cpu, decode_tokens_per_s=None)
    _, row = section(guide.page(guide.read_records(tmp_path)), "Measured")
    assert row[:5] == ["13B", "2", "none: Some CPU, 6 cores", "host: 80 GiB", "fp16"]
    assert row[6] == ""


def test_what_ran_and_what_would_are_never_mixed(tmp_path: Path) -> None:
    empty = guide.page([])
    kept(tmp_path)
    page = guide.page(guide.read_records(tmp_path))
    assert len(section(empty, "Measured")) == 1
    assert section(page, "Planned") == section(empty, "Planned")
    assert "measured" not in " ".join(section(page, "Planned")[0])


def test_records_stand_by_size_degree_device_and_date(tmp_path: Path) -> None:
    for size, mp, date in [("65B", 1, "1"), ("my-own", 1, "1"), ("7B", 2, "1"), ("7B", 1, "2"), ("7B", 1, "1")]:
        kept(tmp_path, size=size, mp=mp, date=date)
    found = [(record["size"], record["mp"], record["date"]) for record in guide.read_records(tmp_path)]
    assert found == [("7B", 1, "1"), ("7B", 1, "2"), ("7B", 2, "1"), ("65B", 1, "1"), ("my-own", 1, "1")]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"size": "7B"}', "{"])
def test_a_file_that_is_no_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(RequestError, match=r"x\.json is no record of a run"):
        guide.read_records(tmp_path)


def test_the_rows_that_people_ask_about_are_planned() -> None:
    rows = section(guide.page([]), "Planned")[1:]
    asked = {(row[0], row[1], row[3], "offload" in row[4]) for row in rows}
    for gib, offload in (("40 GiB", False), ("24 GiB", False), ("16 GiB", False), ("8 GiB", True)):
        assert ("7B", "1", gib, offload) in asked
    assert {("13B", "2"), ("33B", "4"), ("65B", "8")} <= {tuple(row[:2]) for row in rows}
    assert ("7B", "1", "none: CPU") in {tuple(row[:3]) for row in rows}
    memory = rank_memory(load_size("65B"), 8, Workload(dtype="fp16", seq_len=2048))
    assert next(row[7] for row in rows if row[0] == "65B") == f"{memory.total_bytes / 1e9:.2f} GB"
    assert all(row[8] == "yes" for row in rows if row[2] != "none: CPU")
    for row in rows:  # 1555 GB/s over 13.5 GB of weights, less the embeddings, and 1 GB of cache
        if row[0] == "7B" and row[2].endswith("A100 40GB"):
            assert float(row[6]) == pytest.approx(1555 / 14.29, rel=0.01)


# ---- the figure ------------------------------------------------------------------------------------------------------


def test_the_figure_is_the_same_at_every_drawing_and_shows_models_and_cards() -> None:
    drawn = guide.figure()
    assert drawn == guide.figure()
    elements = [element for element in ElementTree.fromstring(drawn).iter() if element.tag.endswith("}text")]
    texts = {"".join(element.itertext()).strip() for element in elements}
    for size in guide.FIGURE_SIZES:
        assert size in texts
    for card in guide.FIGURE_CARDS:
        assert any(text.startswith(card) for text in texts)
    assert re.search(rb"\d{4}-\d\d-\d\dT", drawn) is None  # no date


def test_the_verb_writes_both_files(tmp_path: Path) -> None:
    kept(tmp_path / "docs" / "runs")
    script = ROOT / "launch" / "plan.py"
    done = run("sh", "-c", 'cd "$0" && exec "$@"', tmp_path, sys.executable, script, "--guide", PYTHONPATH=str(ROOT))
    assert done.code == 0, done.stderr
    assert done.stdout.split() == ["docs/hardware.md", "docs/hardware.svg"]
    assert "13.21 GB" in (tmp_path / "docs" / guide.PAGE).read_text()
    assert (tmp_path / "docs" / guide.FIGURE).read_bytes().startswith(b"<?xml")


def test_without_matplotlib_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guide.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match="pip install matplotlib"):
        guide.write_guide(tmp_path / "docs")
    assert list(tmp_path.iterdir()) == []
