"""The published scores and their intervals: pure functions on tensors and texts."""
