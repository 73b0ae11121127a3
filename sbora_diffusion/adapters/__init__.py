"""The adapter core, shared by both backends: one-hot LoRA factors, disjoint columns, exact merge and removal."""
