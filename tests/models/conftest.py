"""Trainings of these tests preserve a few predictions of the base model instead of many."""

from collections.abc import Iterator

import pytest

from sbora_diffusion.data import batches


@pytest.fixture(scope="module", autouse=True)
def few_prior_samples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "PRIOR_SIZE", 8)
        yield
