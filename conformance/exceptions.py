"""What cannot work, or does not, with the reason for each.

An operator, check and dtype that is refused or fails has to be listed here, and what is listed has to be refused or
fail: `report.complaints` says where it is not so.
"""

from __future__ import annotations

from typing import NamedTuple


class Known(NamedTuple):
    """Why an operator does not pass.

    Attributes:
        verdict: what is expected: `"refused"`, by an error of the library's own; `"failed"`, in another way;
            `"skipped"`: it is not tried.
        reason: why.
        operators: their names.
        checks: in which checks; empty: in all.
        dtypes: with which dtypes; empty: with all.
    """

    verdict: str
    reason: str
    operators: tuple[str, ...]
    checks: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()

    def covers(self, operator: str, check: str, dtype: str) -> bool:
        """Whether this is about an operator in a check with a dtype."""
        return (
            operator in self.operators
            and (not self.checks or check in self.checks)
            and (not self.dtypes or dtype in self.dtypes)
        )


KNOWN: tuple[Known, ...] = ()


def reasons(operator: str, check: str, dtype: str) -> list[Known]:
    """What is known about an operator in a check with a dtype."""
    return [known for known in KNOWN if known.covers(operator, check, dtype)]


def skipped(operator: str, check: str, dtype: str) -> bool:
    """Whether something is not tried."""
    return any(known.verdict == "skipped" for known in reasons(operator, check, dtype))
