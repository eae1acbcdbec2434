"""Stage 6, execution: plans become files of an output, and what lies beside them."""
