"""The configuration of a merged adapter."""

from __future__ import annotations

from safemerge_fast.recipes.safemerge.adapter.settings import target_modules


def test_target_modules_cover_just_the_adapted_ones() -> None:
    everything = [
        f"model.layers.{layer}.{leaf}" for layer in range(3) for leaf in ("a.q_proj", "a.v_proj", "mlp.up")
    ]
    q = [name for name in everything if name.endswith("q_proj")]
    assert target_modules(q, everything) == ["q_proj"]
    assert target_modules(q[:2], everything) == q[:2]
    assert target_modules([*q, everything[2]], everything) == [everything[2], "q_proj"]
