"""A mask over what tensors are made of: of each element, how much is taken of what is merged."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..decision import Decision
from ..errors import AdapterError
from ..pairing.module import Module, whole
from ..pairing.operand import OWN_NAME, Operand
from ..pairing.row import Row
from .blend import Composer
from .methods import summing_method
from .operation import Mask, Operation

__all__ = ["Masked"]


@dataclass(frozen=True, slots=True)
class Masked:
    """What another composer makes, element by element as far as a mask lets it.

    Attributes:
        inner: What merges.
        source: The role that holds the shares, each under its tensor's own name.
    """

    inner: Composer
    source: str
    _shared: dict[int, tuple[Operation, Operation]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def kept(self) -> str:
        """The role that tensors come from which are not merged, and elements whose share is 0."""
        return self.inner.kept

    def compose(self, subject: Row | Module, decision: Decision) -> Operation:
        """Says what one tensor is made of, or one module as a piece of its tensor.

        Raises:
            PairingError: What the inner composer raises.
            AdapterError: An adapter makes a sum of the tensor that is kept.
        """
        made = self.inner.compose(subject, decision)
        if not decision.merge:
            return made
        plain = subject.is_plain(self.kept)
        if plain and id(made) in self._shared:
            # Nearly all tensors share one object.
            return self._shared[id(made)][1]
        module = subject if isinstance(subject, Module) else whole(subject)
        terms = module.piece_terms[self.kept]
        if len(terms) > 1 or terms[0].weight != 1.0:
            raise AdapterError(
                f"the {self.kept} adapter adds a vector to {module.name} (lora_bias), which a mask cannot keep as one "
                f"tensor; fold the adapter first (recipe: fold)"
            )
        kept = terms[0].operand
        if plain:
            kept = replace(kept, tensor=OWN_NAME)
        method, parameters = made.method, made.parameters
        arguments = made.arguments
        if method is None:
            # A copy is no method; a sum of one is.
            method, parameters = summing_method().name, (("normalize", False),)
            arguments = (replace(arguments[0], weight=1.0),)
        mask = Mask(Operand(self.source, module.row.name if not plain else OWN_NAME), kept)
        masked = replace(made, arguments=arguments, method=method, parameters=parameters, mask=mask)
        if plain:
            self._shared[id(made)] = (made, masked)
        return masked
