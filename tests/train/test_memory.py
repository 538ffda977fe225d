"""Freed memory is used again: no page of a large block is fetched from the system a second time."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from recsys.train.memory import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_a_large_block_is_handed_out_again() -> None:
    assert keep_freed_memory()
    numbers = 16 * 2**20  # 64 MiB of float32, 16,384 pages

    def touch() -> None:
        torch.empty(numbers).fill_(1.0)

    for _ in range(40):  # until there are enough of them between the small blocks that stay
        touch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        touch()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000
