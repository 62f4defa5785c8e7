"""Check that a checkpoint is whole: by its manifest.json, by Meta's checklist.chk, or, with neither, by its structure.
Against another: every value, and then the logits that the two make, to the last bit.

Prints a line for each fault, with its file and tensor. Exit code 0: whole; 1: not.

Examples:
    python launch/verify.py ~/llama-mp/65B
    python launch/verify.py ~/llama-mp/65B-mp2 --against ~/llama-mp/65B
    python launch/verify.py model.gguf --json
"""

from dataclasses import replace

from llama_mp import cli
from llama_mp.checkpoint.verify import VerifyFlags, verify
from llama_mp.errors import RunError


def main(flags: VerifyFlags) -> None:
    report = verify(flags)
    if flags.against and not report.check.faults:
        from llama_mp.compare_logits import compare_logits  # slow to import, and needed for this alone

        report = replace(report, logits=compare_logits(flags.path, flags.against))
    print(report.as_json if flags.json else "\n".join(report.lines), flush=True)
    if report.failure:
        raise RunError(report.failure)


if __name__ == "__main__":
    cli.main(VerifyFlags, main, summary=__doc__)
