"""What pytest's items and reports are to the suite: checks on cases, or tests of others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft_conformance.rendering.terminal import Place

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

    from polydraft_conformance.catalog import Check
    from polydraft_conformance.pairs import Case

__all__ = ["MARK", "ROW_PROPERTY", "case_of", "check_of", "place_of", "places_of_ids", "status_of"]

MARK = "polydraft_check"
"""The marker of checks; its argument is the check's name."""
ROW_PROPERTY = "polydraft_row"
"""The user property of a report that holds its row."""


def check_of(item: pytest.Item) -> Check | None:
    """The check that an item runs; None for tests that are not the suite's."""
    from polydraft_conformance.catalog import CHECKS

    mark = item.get_closest_marker(MARK)
    return CHECKS[mark.args[0]] if mark else None


def case_of(item: pytest.Item) -> Case | None:
    """The case that an item runs on; None for checks of scope ``backend``."""
    callspec = getattr(item, "callspec", None)
    case: Case | None = callspec.params.get("polydraft_case") if callspec else None
    return case


def place_of(item: pytest.Item) -> Place | None:
    """What an item runs; None for tests that are not the suite's."""
    check, case = check_of(item), case_of(item)
    if check is None:
        return None
    if case is None:
        return Place(check.name, check.group, None, None, None)
    return Place(check.name, check.group, case.pair.name, case.kind, case.k)


def places_of_ids(node_ids: Iterable[str]) -> dict[str, Place]:
    """What items run, by node id; only checks are kept."""
    from polydraft_conformance.outcomes import parse_node_id

    found = {}
    for node_id in node_ids:
        check, place = parse_node_id(node_id)
        if check is not None:
            found[node_id] = Place(check.name, check.group, *place)
    return found


def status_of(report: pytest.TestReport) -> str | None:
    """The status of the row that a report brings; None where it brings none."""
    sent = [value for name, value in report.user_properties if name == ROW_PROPERTY]
    return str(sent[-1]["status"]) if sent and isinstance(sent[-1], dict) else None
