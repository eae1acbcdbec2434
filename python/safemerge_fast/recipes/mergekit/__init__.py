"""Configurations as mergekit writes them: which models, which layers, which method, and its parameters.

A configuration becomes a plan in the order of the modules: document (YAML to records), references (models are found
and opened), layers (which tensor is in which layer), sources (what each model has for an output tensor), settings
(values of parameters for a tensor), planning (the operation of each tensor) and execution.
"""
