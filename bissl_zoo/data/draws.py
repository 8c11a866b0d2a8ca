"""Random draws that are a function of what is drawn for, and not of what was drawn before."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def drawn_for(*key: int) -> Iterator[None]:
    """Seed Python, NumPy and torch (on the CPU) by `key`, whole numbers from 0 on; their states are put back after it.

    So the views of a sample are the same whichever process makes them, and in a run that was interrupted.
    """
    seed, small = np.random.SeedSequence(key).generate_state(2, np.uint64).tolist()
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(small % 2**32)
    torch.default_generator.manual_seed(seed % 2**63)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
