"""DARE and DELLA drop at random, TIES draws among equals: shares, independence, and what is done to what stays.

The models are their own task vectors: the base is zero. Bounds are five deviations of the count expected.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_merge import engine_merge

DEVIATIONS = 5.0


def merge_task_vectors(
    directory: Path,
    method: str,
    deltas: list[torch.Tensor],
    each: dict[str, Any],
    *,
    weights: list[float] | None = None,
    names: tuple[str, ...] = ("x",),
    **shared: Any,
) -> dict[str, torch.Tensor]:
    """The sum of sparsified task vectors, the same under each name."""
    models = [{name: delta.clone() for name in names} for delta in deltas]
    base = {name: torch.zeros_like(deltas[0]) for name in names}
    operands = [{"weight": weight, **each} for weight in weights or [1.0] * len(deltas)]
    return engine_merge(directory, method, models, base, shared=shared, each=operands)


def assert_share(kept: int, count: int, share: float) -> None:
    deviation = math.sqrt(count * share * (1.0 - share))
    assert abs(kept - count * share) <= DEVIATIONS * deviation, f"{kept / count} of {count}, not {share}"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    # What is zero was dropped.
    return torch.where(tensor == 0, torch.tensor(1e-3), tensor)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_a_share_that_no_magnitude_changes(tmp_path: Path, method: str, density: float) -> None:
    delta = normal(700, 301)
    merged = merge_task_vectors(tmp_path, method, [delta], {"density": density})["x"]
    kept = merged != 0
    assert_share(int(kept.sum()), kept.numel(), density)
    # Neither by place nor by rank.
    order = delta.abs().reshape(-1).argsort()
    for part in [*kept.reshape(-1)[order].chunk(10), *kept.chunk(7, dim=0), *kept.chunk(7, dim=1)]:
        assert_share(int(part.sum()), part.numel(), density)


@pytest.mark.parametrize("density", [0.5, 0.25, 0.3, 0.9])
def test_dare_divides_what_it_keeps_by_the_density(tmp_path: Path, density: float) -> None:
    delta = normal(200, 100)
    merged = merge_task_vectors(tmp_path, "dare_linear", [delta], {"density": density})["x"]
    kept = merged != 0
    expected = (delta.double() / density)[kept]
    # The engine multiplies by 1/density in float32: exact for powers of two, else within an ulp.
    bound = 0.0 if density in (0.5, 0.25) else torch.finfo(torch.float32).eps
    assert ((merged[kept].double() - expected).abs() <= bound * expected.abs()).all()
    assert torch.equal(merged[kept], delta[kept] * torch.tensor(1.0 / density))


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_no_rescale_keeps_values_and_l1_keeps_their_sum(tmp_path: Path, method: str) -> None:
    delta = normal(150, 90)
    plain = merge_task_vectors(tmp_path, method, [delta], {"density": 0.4}, rescale="none")["x"]
    kept = plain != 0
    assert 0 < int(kept.sum()) < kept.numel()
    assert torch.equal(plain[kept], delta[kept])
    scaled = merge_task_vectors(tmp_path, method, [delta], {"density": 0.4}, rescale="l1")["x"]
    assert torch.equal(scaled != 0, kept), "the mask does not depend on the rescaling"
    assert float(scaled.double().abs().sum()) == pytest.approx(float(delta.double().abs().sum()), rel=1e-6)
    ratio = scaled[kept].double() / delta[kept].double()
    assert float(ratio.max() / ratio.min()) == pytest.approx(1.0, abs=1e-6)


def mask_agreement(left: torch.Tensor, right: torch.Tensor, share: float) -> None:
    """Independent masks agree by chance only."""
    both = int(((left != 0) & (right != 0)).sum())
    assert_share(both, left.numel(), share * share)


@pytest.mark.parametrize(("method", "share"), [("dare_linear", 0.4), ("della_linear", 0.4), ("ties", 0.4)])
def test_masks_depend_on_seed_tensor_and_operand_alone(tmp_path: Path, method: str, share: float) -> None:
    # Equal magnitudes, so that nothing but the draw decides in TIES; in DELLA ranks then follow the place, and the
    # probability with them, by epsilon.
    delta = torch.ones(400, 300)
    each = {"density": share, **({"epsilon": 1e-9} if method == "della_linear" else {})}
    names = ("x", "y")
    merged = [
        merge_task_vectors(tmp_path / str(seed), method, [delta], each, names=names, seed=seed)
        for seed in (0, 1, 2**64 - 1)
    ]
    again = merge_task_vectors(tmp_path / "again", method, [delta], each, names=names, seed=1)
    assert all(torch.equal(again[name], merged[1][name]) for name in names)
    mask_agreement(merged[0]["x"], merged[0]["y"], share)
    mask_agreement(merged[0]["x"], merged[1]["x"], share)
    mask_agreement(merged[1]["x"], merged[2]["x"], share)
    # Two operands with weights that tell them apart in the sum: the mask of the first is as before.
    if method != "ties":
        two = merge_task_vectors(
            tmp_path / "two", method, [delta, delta], each, weights=[1.0, 4.0], rescale="none", seed=0
        )["x"]
        first, second = two % 4 == 1, two >= 4
        assert torch.equal(first, merged[0]["x"] != 0)
        mask_agreement(first, second, share)


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_keeps_by_rank_within_the_row(tmp_path: Path, method: str) -> None:
    rows, columns, density, epsilon = 20_000, 12, 0.45, 0.35
    generator = torch.Generator().manual_seed(5)
    # Each row holds magnitudes 1 to 12 in an order of its own, so that a magnitude is a rank.
    ranks = torch.rand(rows, columns, generator=generator).argsort(dim=1)
    signs = torch.randint(0, 2, (rows, columns), generator=generator) * 2 - 1
    delta = ((ranks + 1) * signs).float()
    merged = merge_task_vectors(tmp_path, method, [delta], {"density": density, "epsilon": epsilon})["x"]
    for rank in range(columns):
        share = density - epsilon + 2.0 * epsilon * rank / (columns - 1)
        of_rank = merged[ranks == rank]
        kept = of_rank[of_rank != 0].double()
        assert_share(kept.numel(), rows, share)
        expected = np.float32((rank + 1) / share)
        assert torch.equal(kept.abs(), torch.full_like(kept, float(expected)))
    # The place in the row does not matter.
    for column in (merged != 0).T:
        assert_share(int(column.sum()), rows, density)


def test_della_takes_rows_one_by_one(tmp_path: Path) -> None:
    # The smallest element of a row of large ones ranks below the largest of a row of small ones.
    rows = 4000
    delta = torch.tensor([[100.0, 200.0], [1.0, 2.0]]).repeat(rows // 2, 1)
    merged = merge_task_vectors(tmp_path, "della_linear", [delta], {"density": 0.5, "epsilon": 0.4})["x"]
    for start in (0, 1):
        low, high = (merged[start::2] != 0).sum(dim=0).tolist()
        assert_share(low, rows // 2, 0.1)
        assert_share(high, rows // 2, 0.9)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.77])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_tied_bfloat16_updates_keep_the_density(tmp_path: Path, method: str, density: float) -> None:
    # Fine-tunes in bfloat16 differ by few distinct steps: here of 60,000 elements about 20 magnitudes.
    generator = torch.Generator().manual_seed(1)
    steps = torch.randint(-20, 21, (200, 300), generator=generator)
    delta = (steps * 2.0**-9).to(torch.bfloat16)
    delta[steps == 0] = 2.0**-9
    assert delta.abs().unique().numel() <= 21
    each = {"density": density, **({"gamma": 0.1} if method == "breadcrumbs" else {})}
    merged = merge_task_vectors(tmp_path, method, [delta], each)["x"]
    kept = int((merged != 0).sum())
    wanted = int(density * delta.numel())
    # Only elements at the border are drawn: those of one magnitude, or two.
    borders = 2 if method == "breadcrumbs" else 1
    tied = int(delta.abs().unique(return_counts=True)[1].max())
    assert abs(kept - wanted) <= DEVIATIONS * math.sqrt(borders * tied * 0.25)
    assert torch.equal(merged[merged != 0], delta[merged != 0])
