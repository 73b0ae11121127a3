"""What the tests of models use, too."""

from ..models.conftest import few_prior_samples

__all__ = ["few_prior_samples"]
