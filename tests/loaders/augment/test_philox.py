"""The generator against its authors' known answers and NumPy's independent arithmetic."""

import numpy as np
import pytest
import torch

from fastrdm.loaders.augment.philox import philox, uniforms

KNOWN = [  # counter, key, output: kat_vectors of Random123 for philox4x32, 10 rounds
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_known_answers(counter: list[int], key: tuple[int, int], output: list[int]) -> None:
    a, b, c, d = (torch.tensor([word]) for word in counter)
    assert [int(word) for word in philox((a, b, c, d), key)] == output


def by_python(counter: list[int], key: list[int]) -> list[int]:
    """The ten rounds in whole numbers without a bound."""
    for _ in range(10):
        left, right = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [(right >> 32) ^ counter[1] ^ key[0], right % 2**32, (left >> 32) ^ counter[3] ^ key[1], left % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def test_uniforms_lay_out_seed_epoch_view_and_sample() -> None:
    seed, epoch, view = 2**40 + 17, 3, 1
    index = torch.tensor([0, 5, 2**32 - 1])
    got = uniforms(seed, epoch, index, view, 10)
    assert got.shape == (3, 10) and got.dtype == torch.float64
    for row, sample in zip(got, index.tolist(), strict=True):
        words = [w for block in range(3) for w in by_python([block, view, epoch, sample], [17, 256])]
        np.testing.assert_array_equal(row.numpy(), (np.array(words[:10]) + 0.5) / 2**32)


def test_every_argument_counts_and_columns_are_stable() -> None:
    index = torch.arange(100)
    base = uniforms(1, 2, index, 3, 8)
    assert torch.equal(uniforms(1, torch.tensor(2), index, 3, 8), base)
    assert torch.equal(uniforms(1, 2, index, 3, 5), base[:, :5])
    for other in (uniforms(2, 2, index, 3, 8), uniforms(1, 3, index, 3, 8), uniforms(1, 2, index, 4, 8)):
        assert (other != base).all()


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    u = uniforms(0, 0, torch.arange(20000), 0, 36)
    assert (u > 0).all() and (u < 1).all()
    assert (u.mean(0) - 0.5).abs().max() < 5 / (12 * 20000) ** 0.5
    assert (torch.corrcoef(u.T) - torch.eye(36)).abs().max() < 5 / 20000**0.5
    shifted = torch.corrcoef(torch.cat([u[:-1], u[1:]], dim=1).T)[:36, 36:]
    assert shifted.abs().max() < 5 / 20000**0.5
