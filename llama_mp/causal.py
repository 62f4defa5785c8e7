"""Attention of a row's last T tokens over its L positions on a GPU, each seeing itself and those before: by kernels
that make no matrix of scores, nor of masks, [T, L].

torch's `scaled_dot_product_attention` would come to them by way of `causal_lower_right`, which imports torch's compiler
(2 s of each rank), and from torch 2.11 on it prefers cuDNN's kernels on Hopper, which build a plan for each pair of
T and L: 30 ms before the first token, for every new length of a prompt. Shapes as in model.py.
"""

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from llama_mp.activations import ALIGNMENT
from llama_mp.chunks import PREFILL_CHUNK
from llama_mp.layout import padded

LOWER_RIGHT = 2  # `custom_mask_type` of a mask that ends in the corner where the last token meets the last position


def attend_causally(q_BHTD: torch.Tensor, k_BKLD: torch.Tensor, v_BKLD: torch.Tensor) -> torch.Tensor:
    """Softmax(q k^T / sqrt(D)) v, [B, H, T, D], of tensors of one type on a CUDA device.

    Flash attention, for half precision on cards of Ampere and later, takes K < H as it is. For the other kernel, which
    reads fp32 and runs on older cards, keys and values are repeated for each query head."""
    num_heads, num_tokens, head_dim = q_BHTD.shape[1:]
    num_kv_heads, length, _ = k_BKLD.shape[1:]
    is_flash = can_use_flash_attention(SDPAParams(q_BHTD, k_BKLD, v_BKLD, None, 0.0, False, True))
    if is_flash and num_tokens == length == PREFILL_CHUNK["cuda"]:
        # The one pair of T and L that comes again and again: here a plan of cuDNN's, twice as fast, pays.
        return F.scaled_dot_product_attention(q_BHTD, k_BKLD, v_BKLD, is_causal=True, enable_gqa=True)
    if not is_flash and num_heads > num_kv_heads:
        k_BKLD, v_BKLD = (x.repeat_interleave(num_heads // num_kv_heads, dim=1) for x in (k_BKLD, v_BKLD))
    missing = padded(head_dim, ALIGNMENT // q_BHTD.element_size()) - head_dim
    if missing:
        q_BHTD, k_BKLD, v_BKLD = (F.pad(x, (0, missing)) for x in (q_BHTD, k_BKLD, v_BKLD))
    attend = by_flash if is_flash else by_blocks
    y_BHTD = attend(q_BHTD, k_BKLD, v_BKLD, scale=head_dim**-0.5)
    return y_BHTD[..., :head_dim]


def by_flash(q_BHTD: torch.Tensor, k_BKLD: torch.Tensor, v_BKLD: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Dao 2023; this operator's causal mask ends in the lower right corner."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    return attend(q_BHTD, k_BKLD, v_BKLD, 0.0, is_causal=True, scale=scale)[0]


def by_blocks(q_BHTD: torch.Tensor, k_BHLD: torch.Tensor, v_BHLD: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Rabe and Staats 2021, as CUTLASS has it; its tensors are [B, T, H, D]."""
    heads = (x.transpose(1, 2) for x in (q_BHTD, k_BHLD, v_BHLD))
    nothing = [None] * 5  # neither a bias nor rows of several lengths
    y_BTHD = torch.ops.aten._efficient_attention_forward(*heads, *nothing, 0.0, LOWER_RIGHT, scale=scale)[0]
    return y_BTHD.transpose(1, 2)
