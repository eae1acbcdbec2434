"""Stage 5, plan: rows and decisions become output files, each a list of tensors with an operation."""
