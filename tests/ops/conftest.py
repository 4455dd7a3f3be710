"""Memory that nothing has written holds NaN in these tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Runs of other tests switch it off."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filled
