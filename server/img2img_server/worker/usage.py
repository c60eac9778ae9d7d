"""The device time that the workers of a model have spent on each tenant."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from img2img_server.domain.params import JobParams
from img2img_server.engine.fair_share import FairShare
from img2img_server.interfaces.queue import UsageReport

# Used until the worker has measured its device.
_UNMEASURED_PIXEL_STEP_SECONDS = 1e-6


class FleetUsage:
    """Device seconds by tenant, of this worker and by the reports of the others.

    Only differences between tenants matter. A tenant whose first job arrives starts at the level
    of the tenant that has had the least, because idle time earns no credit.
    """

    def __init__(self, worker: str, model: str) -> None:
        self._share = FairShare()
        self._present: frozenset[str] = frozenset()
        self._report = UsageReport(worker=worker, model=model, seconds={})

    def level(self, tenant: str) -> float:
        """Returns the device seconds of a tenant that has unfinished jobs."""
        return self._share[tenant] if tenant in self._present else 0.0

    def update_tenants(self, present: Collection[str]) -> None:
        """Notes which tenants have unfinished jobs."""
        for tenant in present:
            self._share.activate(tenant, self._present)
        self._present = frozenset(present)
        self._share.evict(self._present)

    def add_step(self, tenant: str, params: JobParams, pixel_step_seconds: float) -> None:
        """Counts one step of one sample on this worker.

        Args:
            pixel_step_seconds: the measured device seconds of a pixel-step; 0.0: not measured.
        """
        rate = pixel_step_seconds or _UNMEASURED_PIXEL_STEP_SECONDS
        seconds = rate * params.width * params.height
        self._add(tenant, seconds)
        own = self._report.seconds
        own[tenant] = own.get(tenant, 0.0) + seconds

    def receive(self, report: UsageReport) -> None:
        """Counts what another worker of the model has reported."""
        if report.model == self._report.model and report.worker != self._report.worker:
            for tenant, seconds in report.seconds.items():
                self._add(tenant, seconds)

    def take_report(self) -> UsageReport | None:
        """Returns what this worker has counted since the last call; None: nothing."""
        if not self._report.seconds:
            return None
        report, self._report = self._report, replace(self._report, seconds={})
        return report

    def _add(self, tenant: str, seconds: float) -> None:
        if tenant not in self._present:
            self.update_tenants({*self._present, tenant})
        self._share.add(tenant, seconds)
