"""pytest-xdist's ``-n``: checks of one target stay in one process, which loads it and decodes plainly once.

Imported only where pytest-xdist is installed. Written for its 3.8, whose scheduler by scope runs a test that ended its
process again, and may hang after that.
"""

from __future__ import annotations

from typing import Any

from xdist.scheduler import LoadScopeScheduling

from polydraft_conformance.outcomes import parse_node_id

__all__ = ["ByTarget"]


class ByTarget(LoadScopeScheduling):  # type: ignore[misc] # pytest-xdist has no types
    """Gives each process the tests of one target after another, and other tests one by one."""

    def _split_scope(self, nodeid: str) -> str:
        check, (target, _, _) = parse_node_id(nodeid)
        # A varied copy goes where its original does: what passes there is compared.
        return (target.removeprefix("varied-") if check and target else None) or nodeid

    def remove_node(self, node: Any) -> str | None:
        """What a process that has died leaves goes to others, without the test that it died of."""
        workload = self.assigned_work.pop(node)
        crashed = next((test for unit in workload.values() for test, done in unit.items() if not done), None)
        if crashed is not None:
            workload[self._split_scope(crashed)][crashed] = True
            self.workqueue.update({scope: unit for scope, unit in workload.items() if not all(unit.values())})
            for other in self.assigned_work:
                self._reschedule(other)
        return crashed

    def _assign_work_unit(self, node: Any) -> None:
        if not self.workqueue:  # more processes than targets
            node.shutdown()
            return
        super()._assign_work_unit(node)
        # A process runs its last test only once it knows that none follows: with a single one it would wait forever.
        if self._pending_of(self.assigned_work[node]) < 2:
            if self.workqueue:
                self._assign_work_unit(node)
            else:
                node.shutdown()
