"""The four searches, and what is asked of every call of them."""

from __future__ import annotations

import warnings
from typing import NamedTuple

from hypothesis import reject
from hypothesis import strategies as st

from .calls import FUNCTIONAL, OPS, Call
from .found import KNOWN, is_known
from .oracle import check
from .search import little_memory
from .strategies import broken_calls, valid_calls


class Kind(NamedTuple):
    """One search: which calls are drawn, and whether they must give values."""

    name: str
    where: str
    valid: bool

    def calls(self) -> st.SearchStrategy[Call]:
        return valid_calls(self.where) if self.valid else broken_calls(self.where)

    def answer(self, call: Call) -> str:
        """What came of a call, see oracle.check; AssertionError where it is not as it must be."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own: parts of it are in beta, and so on
            try:
                arguments = call.arguments()
            except Exception:
                reject()  # what an argument was replaced by does not exist
            if is_known(call, arguments):
                return KNOWN
            with little_memory():
                return check(call, arguments, self.valid)


KINDS = (
    Kind("values of functions", FUNCTIONAL, valid=True),
    Kind("values of ops", OPS, valid=True),
    Kind("bad arguments of functions", FUNCTIONAL, valid=False),
    Kind("bad arguments of ops", OPS, valid=False),
)
VALUES_OF_FUNCTIONS, VALUES_OF_OPS, BAD_FOR_FUNCTIONS, BAD_FOR_OPS = KINDS
