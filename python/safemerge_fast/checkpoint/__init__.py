"""Stage 1, checkpoint: models and adapters, found, opened and judged; headers only."""
