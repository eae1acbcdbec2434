"""How roles' terms become one output tensor: shared matrices, weights, and what is left apart."""

from __future__ import annotations

import pytest

from safemerge_fast.pairing.operand import LowRank, Magnitude, Operand, Rows, Term
from safemerge_fast.plan.operation import combine, weighted_sum


class TestOperation:
    @staticmethod
    def adapted(role: str, scale: float) -> tuple[Term, ...]:
        product = LowRank(role, f"{role}.A", f"{role}.B", scale, 4, False)
        return (Term(Operand("aligned", "w", low_rank=(product,))),)

    def test_two_adapters_share_the_matrix(self) -> None:
        terms = combine([(0.8, self.adapted("finetuned", 2.0)), (1 - 0.8, self.adapted("safe", 0.5))])
        operation = weighted_sum(terms)
        (term,) = terms
        assert term.weight == 1.0
        assert [product.scale for product in term.operand.low_rank] == pytest.approx([1.6, 0.1], rel=1e-15)
        assert operation.describe() == "linear: aligned + 1.6·B·A(finetuned) + 0.1·B·A(safe)"

    def test_an_adapter_and_the_matrix_itself(self) -> None:
        (term,) = combine([(0.8, self.adapted("finetuned", 2.0)), (0.2, (Term(Operand("aligned", "w")),))])
        assert term.weight == 1.0
        assert [product.scale for product in term.operand.low_rank] == [1.6]

    def test_the_same_plain_tensor_is_a_copy(self) -> None:
        same = (Term(Operand("aligned", "w")),)
        operation = weighted_sum(combine([(0.7, same), (1 - 0.7, same)]))
        assert operation.is_copy
        assert operation.to_plan() == {"copy": {"source": "aligned", "tensor": "w"}}
        assert operation.describe() == "copy: aligned"

    def test_weights_that_do_not_sum_to_one_stay(self) -> None:
        (term,) = combine([(0.5, self.adapted("finetuned", 2.0)), (0.25, self.adapted("safe", 1.0))])
        assert term.weight == 0.75
        # 0.75·(W + s1 P1 + s2 P2) = 0.5 (W + 2 P1) + 0.25 (W + P2)
        assert [0.75 * product.scale for product in term.operand.low_rank] == pytest.approx(
            [1.0, 0.25], rel=1e-15
        )

    def test_weights_that_cancel_are_left_apart(self) -> None:
        terms = combine([(1.0, self.adapted("finetuned", 2.0)), (-1.0, self.adapted("safe", 1.0))])
        assert [term.weight for term in terms] == [1.0, -1.0]

    def test_norms_and_rows_are_not_added_up(self) -> None:
        magnitude = (Term(Operand("aligned", "w", magnitude=Magnitude("finetuned", "m", False))),)
        rows = (Term(Operand("aligned", "w", rows=Rows("safe", "t", (1,)))),)
        assert combine([(0.8, magnitude), (0.2, rows)]) == (
            Term(magnitude[0].operand, 0.8),
            Term(rows[0].operand, 0.2),
        )
        assert len(combine([(0.8, magnitude), (0.2, magnitude)])) == 2

    def test_plain_models_keep_their_order_and_weights(self) -> None:
        finetuned, safe = Term(Operand("finetuned", "w")), Term(Operand("safe", "w"))
        terms = combine([(0.8, (finetuned,)), (0.2, (safe,))])
        assert terms == (Term(finetuned.operand, 0.8), Term(safe.operand, 0.2))
        assert weighted_sum(terms).describe() == "linear: 0.8 finetuned + 0.2 safe"
