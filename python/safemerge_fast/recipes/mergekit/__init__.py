"""Configurations as mergekit writes them: which models, which layers, which method, and its parameters.

A configuration becomes a plan in the order of the modules: models (found and opened, by name), document (YAML to
records), slices (what each is merged from, and the tensors it gives), configuration (whether the models fit together),
operations (what merges a tensor, with its parameters), tensors (what each model has for it) and job.
"""

from __future__ import annotations

from ..base import Recipe
from .job import MergekitJob, MergekitSettings, read_settings_of

__all__ = ["RECIPE"]

RECIPE = Recipe(
    name="mergekit",
    summary="Merges models as a configuration in mergekit's format says: a file with a merge_method.",
    settings=MergekitSettings,
    open=MergekitJob,
    read=read_settings_of,
)
