"""SafeMERGE (arXiv 2503.17239): modules that left the safety subspace are merged with a safe model."""
