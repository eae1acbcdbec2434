"""Recipes: small functions that say what merged tensors are made of; which are merged is the decision's."""
