"""Checkpoints that are broken in every way we know, loaded over two ranks: each says one thing, with the remedy.

The files are broken as downloads and copies break them. test_refusals.py has the same from end to end, for a few.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jobs
import pytest
import torch
from factory import MODELS, hugging_face, meta_tensors, random_tensors, write_meta
from ranks import Ranks

from llama_mp import LLM
from llama_mp.errors import MAX_LINE, RequestError, RunError, one_line

CONFIG = MODELS["gqa"]
ONE_DOWNLOAD = "check that params.json and all shards come from one download"
FIRST, SECOND = "consolidated.00.pth", "consolidated.01.pth"


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint of two shards, to be broken."""
    return Path(shutil.copytree(tiny, tmp_path / "a model"))


def refused(ranks: Ranks, folder: Path, tokenizer: Path | None = None) -> str:
    """The one line with which both ranks refuse a checkpoint as a wrong request."""
    found = ranks.run(2, jobs.refusal, path=folder, tokenizer=tokenizer or folder / "tokenizer.model")
    assert found == [found[0]] * 2, "the ranks differ, so the line would depend on who is first"
    code, text = found[0]
    assert code == 2 and "\n" not in text, found
    return text


def edit_params(folder: Path, **values: int) -> None:
    file = folder / "params.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# ---- files that are no shards ------------------------------------------------------------------------------------


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1000)


def replace_by_a_page(file: Path) -> None:
    file.write_text("<!DOCTYPE html>\n<title>403: you have to log in</title>\n")


@pytest.mark.parametrize("name", [FIRST, SECOND])
@pytest.mark.parametrize(
    ("spoil", "says", "remedy"),
    [
        (cut_short, "is not a whole torch file (", "; copy it again"),
        (
            replace_by_a_page,
            "is no file of torch.save as of torch 1.6 or later (it begins with b'<!DO')",
            ": download it again",
        ),
    ],
)
def test_a_file_that_is_no_shard_is_named(
    ranks: Ranks, folder: Path, name: str, spoil: Callable[[Path], None], says: str, remedy: str
) -> None:
    spoil(folder / name)
    said = refused(ranks, folder)
    assert said.startswith(f"{folder / name} {says}") and remedy in said


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(ranks: Ranks, folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"norm.weight": RunsCode(marker)}, folder / SECOND)
    said = refused(ranks, folder)
    assert said.startswith(f"{folder / SECOND} would run code when loaded, or holds more than weights: refused (")
    assert said.endswith("; get it from a source that you trust")
    assert not marker.exists()
    torch.load(folder / SECOND, weights_only=False)  # what we do not do: the file does run code
    assert marker.exists()


# ---- files that do not belong together ---------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"dim": 128}, {"n_heads": 4}, {"n_layers": 3}, {"n_layers": 1}])
def test_a_params_json_of_another_size(ranks: Ranks, folder: Path, wrong: dict[str, int]) -> None:
    edit_params(folder, **wrong)
    said = refused(ranks, folder)
    assert said.startswith(str(folder)) and "come from one download" in said
    assert "has shape" in said or "layers.2.attention.wk.weight is missing" in said or "layers.1." in said


def test_shards_of_two_models(ranks: Ranks, folder: Path, tmp_path: Path) -> None:
    for other, says in (
        (replace(CONFIG, hidden_dim=100), "layers.0.feed_forward.w1.weight has shape (50, 64), not (45, 64)"),
        (replace(CONFIG, num_layers=3), "and consolidated.00.pth hold different tensors (layers.2.attention."),
    ):
        donor = write_meta(
            tmp_path / f"{other.num_layers} layers of {other.hidden_dim}", other, random_tensors(other), 2
        )
        shutil.copy(donor / SECOND, folder / SECOND)
        said = refused(ranks, folder)
        assert SECOND in said and says in said and said.endswith(ONE_DOWNLOAD)


def test_a_tokenizer_with_more_ids_than_the_model(ranks: Ranks, folder: Path, smollm2_file: Path) -> None:
    says = f"the tokenizer {smollm2_file} has 49152 ids, the model gqa %d: give the model's own with --tokenizer"
    assert refused(ranks, folder, smollm2_file) == says % 331
    own = json.loads((folder / "params.json").read_text())["llama_mp"] | {"vocab_size": 0}
    edit_params(folder, vocab_size=-1, llama_mp=own)  # as in LLaMA 1: the tensors tell, with the padding of two shards
    assert refused(ranks, folder, smollm2_file) == says % 332


def test_a_tokenizer_with_far_fewer_ids_than_the_model(ranks: Ranks, tmp_path: Path, tokenizer_file: Path) -> None:
    config = replace(CONFIG, vocab_size=2000)
    folder = write_meta(tmp_path / "large", config, random_tensors(config), 2)
    said = refused(ranks, folder, tokenizer_file)
    assert "ids, the model gqa 2000: give the model's own with --tokenizer" in said


# ---- weights that are not numbers --------------------------------------------------------------------------------


def with_nan(folder: Path, name: str) -> Path:
    tensors = meta_tensors(hugging_face(CONFIG))
    tensors[name][-1] = float("nan")
    return write_meta(folder, CONFIG, tensors, 2)


def test_nan_is_warned_of_once_by_its_name(ranks: Ranks, tmp_path: Path, tokenizer_file: Path) -> None:
    folder = with_nan(tmp_path / "nan", "output.weight")  # the last row: rank 1 alone has it
    said, silence = ranks.run(2, jobs.said_while_loading, path=folder, tokenizer=tokenizer_file)
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and silence == ""
    assert warnings[0].startswith(f"warning: {folder} holds NaN or infinity in output.weight: ")
    assert "download it again" in warnings[0]


def test_nan_in_the_answer_ends_the_run_in_words_that_fit_the_warning(
    tmp_path: Path, tokenizer_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = with_nan(tmp_path / "nan", "norm.weight")
    with LLM(folder, tokenizer=tokenizer_file, device="cpu") as llm:
        assert capfd.readouterr().err.count("warning: ") == 1
        with pytest.raises(RunError, match="logits are not finite: a weight is not, of which a warning then told"):
            llm.generate(["Hi"])


def test_a_sound_model_is_loaded_without_a_word(ranks: Ranks, folder: Path) -> None:
    said = ranks.run(2, jobs.said_while_loading, path=folder, tokenizer=folder / "tokenizer.model")
    assert not any("warning" in text for text in said)


def test_names_from_files_send_no_commands_to_a_terminal() -> None:
    said = one_line(RequestError("tensor \x1b[2J\x07\u202e\x00 of żółć 🤖\n is unknown"))
    assert said == "tensor \\x1b[2J\\x07\\u202e\\x00 of żółć 🤖 is unknown"
    long = one_line(RequestError(f"tensor {'x' * 10**6} is unknown; download it again"))
    assert (
        len(long) < 2 * MAX_LINE
        and long.startswith("tensor xxx")
        and long.endswith("xxx is unknown; download it again")
    )
