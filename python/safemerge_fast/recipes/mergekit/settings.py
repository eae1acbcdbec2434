"""The values of a method's parameters for one tensor: the nearest place that gives one counts."""

from __future__ import annotations

from collections.abc import Iterable

from ...errors import PlanError
from .methods import Method, Parameter
from .values import Entry, Parameters, Scalar

__all__ = ["Settings"]


class Settings:
    """Looks parameters up, from the nearest place outwards, and remembers which entries were of use."""

    def __init__(self, method: Method) -> None:
        """Starts with no entry used.

        Args:
            method: The method whose parameters are looked up.
        """
        self._method = method
        self._used: set[str] = set()

    def look_up(
        self, scope: str, places: Iterable[Parameters], *, name: str, t: float, where: str
    ) -> dict[str, Scalar]:
        """Finds the values of all parameters of a scope for one tensor.

        Args:
            scope: "shared" or "operand".
            places: What is given where, the nearest place first.
            name: The tensor's name, which filters are compared with.
            t: Its place among the layers, from 0 to 1.
            where: Where a parameter that is missing should be given, for error messages.

        Returns:
            Every parameter of the scope, by name.

        Raises:
            PlanError: One must be given, and is not.
        """
        places = list(places)
        return {
            parameter: self._value(self._method.parameters[parameter], places, name, t, where)
            for parameter in self._method.names(scope)
        }

    def _value(
        self, parameter: Parameter, places: Iterable[Parameters], name: str, t: float, where: str
    ) -> Scalar:
        given = False
        for parameters in places:
            if parameter.name not in parameters:
                continue
            given = True
            if (entry := parameters[parameter.name].entry(name)) is not None:
                self._used.add(entry.place)
                return entry.at(t)
        if parameter.default is not None:
            return parameter.default
        problem = (
            f"no filter of {parameter.name} matches {name}, and {self._method.name} has no default for it; add an "
            f"entry without filter"
            if given
            else f"{self._method.name} needs the parameter {parameter.name}; add it"
        )
        raise PlanError(f"{where}: {problem}")

    def unused(self, given: Iterable[Parameters]) -> list[Entry]:
        """Those of the entries that no tensor's value came from."""
        return [
            entry
            for parameters in given
            for value in parameters.values()
            for entry in value.entries
            if entry.place not in self._used
        ]
