"""Recipes: small functions that say what merged tensors are made of. Which tensors are merged is the decision's part."""
