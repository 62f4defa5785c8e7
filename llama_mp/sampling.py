"""Choosing tokens from logits: pure functions, called on rank 0 alone. Nothing here waits for a GPU.

Shapes: B rows of the batch, R of them drawn at random, V tokens of the vocabulary, K candidates, T positions.

A token's weight is its probability over the best one's, as a whole number of 2**-34. Sums of whole numbers are exact
in any order, so a row's token depends neither on the rows beside it nor on the number of candidates looked at, nor on
how a device splits a sum. A token less probable than 2**-35 of the best one is never drawn.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llama_mp.config import SamplingConfig
from llama_mp.errors import RunError
from llama_mp.transfer import upload

WEIGHT_BITS = 34
ID_BITS = 19  # 34 + 19 bits: sums over the vocabulary are exact in float64 too, a (weight, id) key fits in int64
FEW = 1024  # candidates that nearly always hold the whole of a top_p set; sorting all costs ten times as much
CHUNK_BYTES = 64 * 2**20  # of fp32 log-probabilities at once


@dataclass(frozen=True, kw_only=True)
class Row:
    """How to choose one row's token: `uniform` in [0, 1)."""

    sampling: SamplingConfig
    uniform: float = 0.0


class Chosen(NamedTuple):
    """On the device of the logits: ids, int64 [B], -1 where the logits are not finite; log-probabilities, fp32 [B]."""

    tokens: Tensor
    logprobs: Tensor | None  # when any row asks


def uniform(seed: int, request_id: str, position: int) -> float:
    """A number in [0, 1), of 53 bits, that hangs on these three alone and not on what was drawn before."""
    # The id, which may hold anything, comes last, so no two triples read alike.
    counter = f"{seed},{position},{request_id}".encode(errors="surrogatepass")
    return (int.from_bytes(hashlib.blake2b(counter, digest_size=8).digest()) >> 11) * 2.0**-53


def sample(logits_BV: Tensor, rows: Sequence[Row], seen_BV: Tensor | None = None) -> Chosen:
    """One token for each row.

    In this order: repetition penalty; temperature (0: the best token, the lowest id among equals); top_k; top_p on
    what top_k left, renormalized: the smallest set that reaches the probability; min_p, relative to the best token.
    Then the inverse of the cumulative distribution at `uniform`, tokens sorted by probability, equals by id.
    Log-probabilities are the model's own: of the raw logits, before penalty, temperature and filters.
    `logits_BV` may be of any float type, on any device, and is not changed; -inf rules a token out, and a row with NaN
    or +inf, or -inf alone, is not finite. `seen_BV`, bool: the ids of prompt and answer, where a row has a penalty.
    """
    assert len(rows) == len(logits_BV)
    logits_BV = logits_BV.float()
    scores_BV = _penalize(logits_BV, rows, seen_BV)
    tokens_B = scores_BV.argmax(-1)
    best_B1 = scores_BV.gather(-1, tokens_B[:, None])
    drawn = [index for index, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        drawn_R = upload(drawn, logits_BV.device)
        tokens_B[drawn_R] = _draw(scores_BV[drawn_R] - best_B1[drawn_R], [rows[index] for index in drawn])
    logprobs_B = None
    if any(row.sampling.logprobs for row in rows):
        logprobs_B = logits_BV.log_softmax(-1).gather(-1, tokens_B[:, None])[:, 0]
    # argmax takes NaN for the greatest: one look at the best finds it anywhere, and it travels with the ids.
    return Chosen(torch.where(best_B1[:, 0].isfinite(), tokens_B, -1), logprobs_B)


def check_finite(tokens: Sequence[int]) -> None:
    """Raise RunError when `sample` found logits that are not."""
    if min(tokens, default=0) < 0:
        raise RunError(
            "the model's logits are not finite: a weight is not, of which a warning then told on loading, or a value "
            "overflowed: try --dtype fp32 or bf16"
        )


def token_logprobs(logits_TV: Tensor, next_ids_T: Tensor) -> Tensor:
    """The log-probability, fp32 [T], of the token that follows each position; in chunks of at most CHUNK_BYTES."""
    num_rows = max(1, CHUNK_BYTES // (4 * logits_TV.shape[1]))
    chunks = zip(logits_TV.split(num_rows), next_ids_T.split(num_rows), strict=True)
    return torch.cat([logits.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0] for logits, ids in chunks])


def _penalize(logits_BV: Tensor, rows: Sequence[Row], seen_BV: Tensor | None) -> Tensor:
    penalties = [row.sampling.repetition_penalty for row in rows]
    if all(penalty == 1 for penalty in penalties):
        return logits_BV
    assert seen_BV is not None, "rows with a repetition penalty come with what they have seen"
    penalties_B1 = upload(penalties, logits_BV.device, torch.float32)[:, None]
    penalized_BV = torch.where(logits_BV > 0, logits_BV / penalties_B1, logits_BV * penalties_B1)
    return torch.where(seen_BV, penalized_BV, logits_BV)


def _draw(gaps_RV: Tensor, rows: Sequence[Row]) -> Tensor:
    """Token ids [R] at random; `gaps_RV` is each score less the row's best, at most 0."""
    num_tokens = gaps_RV.shape[1]
    assert num_tokens <= 1 << ID_BITS, f"{num_tokens} tokens do not fit in {ID_BITS} bits"
    top_k = [min(r.sampling.top_k or num_tokens, num_tokens) for r in rows]
    flags = [
        (row.sampling.temperature, k, row.sampling.top_p, row.sampling.min_p, row.uniform)
        for row, k in zip(rows, top_k, strict=True)
    ]
    flags_5R1 = upload(flags, gaps_RV.device, torch.float64).T[:, :, None]
    # A row with NaN is refused in the end; until then it must not become an index out of range.
    gaps_RV = gaps_RV.double().nan_to_num_(nan=-torch.inf)
    weights_RV = gaps_RV.div_(flags_5R1[0]).exp_().mul_(1 << WEIGHT_BITS).round_().long()
    # One number for weight and id, equal weights in the order of ids: topk promises none among equals.
    keys_RV = weights_RV << ID_BITS | torch.arange(num_tokens - 1, -1, -1, device=gaps_RV.device)
    mass_R1 = weights_RV.sum(-1, keepdim=True)
    few = min(num_tokens, max([FEW, *(k for k in top_k if k < num_tokens)]))
    on_gpu = gaps_RV.device.type == "cuda"
    if on_gpu and max(top_k) == num_tokens:
        few = num_tokens  # whether fewer are enough only the host could tell, and it would wait
    keys_R, whole_R = _pick(_best(keys_RV, few), mass_R1, flags_5R1[1:])
    if few < num_tokens and not on_gpu and not whole_R.all():
        keys_R, _ = _pick(_best(keys_RV, num_tokens), mass_R1, flags_5R1[1:])
    return num_tokens - 1 - (keys_R & (1 << ID_BITS) - 1)


def _best(keys_RV: Tensor, count: int) -> Tensor:
    """The `count` greatest of each row, sorted."""
    if count < keys_RV.shape[1]:
        return keys_RV.topk(count).values
    return keys_RV.sort(descending=True).values


def _pick(keys_RK: Tensor, mass_R1: Tensor, flags_4R1: Tensor) -> tuple[Tensor, Tensor]:
    """The keys [R] drawn among the K best, sorted, and whether these were the whole of what the filters keep.

    Each filter keeps the first few of the sorted tokens, so that together they keep the fewest of any.
    `mass_R1` is the weight of the whole vocabulary, which a row's K best are a part of when it has no top_k.
    """
    top_k_R1, top_p_R1, min_p_R1, uniform_R1 = flags_4R1
    num_candidates = keys_RK.shape[1]
    weights_RK = (keys_RK >> ID_BITS) * (torch.arange(num_candidates, device=keys_RK.device) < top_k_R1)
    ends_RK = weights_RK.cumsum(-1)
    mass_R1 = torch.where(top_k_R1 <= num_candidates, ends_RK[:, -1:], mass_R1)
    starts_RK = ends_RK - weights_RK
    kept_RK = (starts_RK < top_p_R1 * mass_R1) & (weights_RK >= min_p_R1 * (1 << WEIGHT_BITS))
    kept_mass_R1 = (weights_RK * kept_RK).sum(-1, keepdim=True)
    target_R1 = torch.minimum((uniform_R1 * kept_mass_R1).long(), kept_mass_R1 - 1)
    place_R1 = torch.searchsorted(ends_RK, target_R1, right=True)
    whole_R = ~kept_RK[:, -1] | (ends_RK[:, -1] == mass_R1[:, 0])
    return keys_RK.gather(-1, place_R1)[:, 0], whole_R
