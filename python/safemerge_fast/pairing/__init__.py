"""Stage 2, pairing: one row per output tensor, by name, with what each role's tensor is made of."""
