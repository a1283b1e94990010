"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in torch int64 arithmetic."""

import torch
from torch import Tensor

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four tensors of random 32-bit words in int64 from four tensors of counter words in [0, 2**32). Nothing waits."""
    a, b, c, d = counter
    first, second = key
    for _ in range(10):
        # The products wrap modulo 2**64: their low and high words are right all the same once masked.
        left, right = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = ((right >> 32) & WORD) ^ b ^ first, right & WORD, ((left >> 32) & WORD) ^ d ^ second, left & WORD
        first, second = (first + KEY_STEPS[0]) & WORD, (second + KEY_STEPS[1]) & WORD
    return a, b, c, d


def uniforms(seed: int, epoch: int | Tensor, index: Tensor, view: int, count: int) -> Tensor:
    """(B, count) float64 in (0, 1), a pure function of seed, epoch, `index` (B,) int64, view and column."""
    block = torch.arange(-(-count // 4), device=index.device)
    sample = (index & WORD)[:, None] + torch.zeros_like(block)
    block = torch.zeros_like(sample) + block
    counter = block, torch.full_like(block, view), torch.zeros_like(block) + epoch, sample
    words = philox(counter, (seed & WORD, (seed >> 32) & WORD))
    return (torch.stack(words, dim=-1).flatten(1)[:, :count].double() + 0.5) / 2**32
