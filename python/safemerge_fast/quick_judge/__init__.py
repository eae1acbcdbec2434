"""A quick judge of models: how often they refuse, and how well they predict a held-out text. transformers is an extra.

prompts and refusals say what is asked and how answers are read; model opens it; judge puts it together.
"""
