"""Pods of rendered manifests as processes of this machine, as near to a kubelet's as they come.

A container keeps its command, its environment, its probes, its volumes at their places and its
read-only root; as root also its user and its lack of capabilities (tests/pod_root.sh). Its pod has
an address of its own in 127.0.0.0/8, which Services lead to by name, so ports stay what they are.
Two things are changed: where it would listen on every address, it listens on the pod's; and S3 has
another port, because weed does not start where any address of the machine uses its own.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import aiohttp
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.local_stack import free_port
from tests.chart_render import NAMESPACE, Object, Pod, of_kind, pods
from tests.pod_content import PodContent

SCRIPT = Path(__file__).with_name("pod_root.sh")
READY_SECONDS = 120.0
POLL_SECONDS = 0.05
USER = 65532
AS_ROOT = os.geteuid() == 0
DROP = (
    [
        *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"),
        *("--no-new-privs", "--bounding-set=-all"),
    ]
    if AS_ROOT
    else []
)
UNSHARE = ["unshare", "--mount"] if AS_ROOT else ["unshare", "--user", "--map-root-user", "--mount"]


def cannot_run_pods() -> str:
    """Why this machine cannot run them; empty when it can."""
    if sys.platform != "linux":
        return "pods as processes need Linux: mount namespaces and all of 127.0.0.0/8"
    if not all(map(shutil.which, ("unshare", "setpriv", "chroot"))):
        return "pods as processes need unshare, setpriv and chroot"
    done = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True)
    return f"no mount namespaces here: {done.stderr.strip()}" if done.returncode else ""


class Kubelet:
    """The pods of rendered objects: the address of each, and the pods of Services."""

    def __init__(self, objects: list[Object], folder: Path) -> None:
        self.objects = objects
        self.folder = folder
        self.hosts = folder / "hosts"
        self.ports = {8333: free_port()}
        # Any part of loopback, so that two test runs at a time do not meet.
        network = f"127.{random.randint(2, 250)}.{random.randint(0, 250)}"
        self.pods = {
            pod.name: RunningPod(self, pod, f"{network}.{number}")
            for number, pod in enumerate(pods(objects), start=2)
        }
        self.hosts.write_text("".join(self._hosts()), encoding="utf-8")

    def _hosts(self) -> list[str]:
        lines = ["127.0.0.1 localhost\n"]
        for name, service in of_kind(self.objects, "Service").items():
            selector = service["spec"]["selector"].items()
            behind = [each for each in self.pods.values() if selector <= each.pod.labels.items()]
            lines += [
                f"{each.address} {name} {name}.{NAMESPACE} {name}.{NAMESPACE}.svc\n"
                for each in behind
            ]
        return lines

    async def stop(self) -> None:
        """Ends what still runs, without ceremony."""
        await asyncio.gather(*(each.kill() for each in self.pods.values()))


class RunningPod:
    """One pod: one main container, after its init containers."""

    def __init__(self, kubelet: Kubelet, pod: Pod, address: str) -> None:
        self.pod = pod
        self.address = address
        self._hosts = kubelet.hosts
        self._ports = kubelet.ports
        self._folder = kubelet.folder / pod.name
        self._content = PodContent(
            kubelet.objects, pod, address, kubelet.ports, self._folder / "volumes"
        )
        self._process: asyncio.subprocess.Process | None = None
        (self.main,) = pod.spec["containers"]

    @property
    def log(self) -> str:
        """Everything that its containers wrote."""
        return (self._folder / "log").read_text(encoding="utf-8", errors="replace")

    @property
    def grace_seconds(self) -> int:
        return int(self.pod.spec["terminationGracePeriodSeconds"])

    async def start(self) -> None:
        """Runs the init containers to their end and starts the main one."""
        self._content.make_volumes(owner=USER if AS_ROOT else os.geteuid())
        for container in self.pod.spec.get("initContainers", []):
            process = await self._run(container)
            assert await process.wait() == 0, self.log
        self._process = await self._run(self.main)

    async def ended(self) -> int:
        """The exit code of the main container."""
        assert self._process is not None, "it was not started"
        return await self._process.wait()

    async def ready(self) -> None:
        """Returns when the startup probe and then the readiness probe are content."""
        for kind in ("startup", "readiness"):
            if f"{kind}Probe" in self.main:
                await self.until(kind, True)

    async def until(self, kind: str, content: bool) -> None:
        """Returns when a probe answers so. Raises AssertionError with the log when it does not."""
        assert self._process is not None, "it was not started"
        deadline = time.monotonic() + READY_SECONDS
        while await self.probe(kind) != content:
            assert self._process.returncode is None or not content, self.log
            assert time.monotonic() < deadline, self.log
            await asyncio.sleep(POLL_SECONDS)

    async def probe(self, kind: str) -> bool:
        """Whether a probe is content: startup, readiness or liveness."""
        asked = self.main[f"{kind}Probe"]
        timeout = asked.get("timeoutSeconds", 1)
        if "grpc" in asked:
            return await self._grpc(asked["grpc"], timeout)
        question = asked.get("httpGet") or asked["tcpSocket"]
        ports = {each["name"]: each["containerPort"] for each in self.main["ports"]}
        port = ports.get(question["port"], question["port"])
        port = self._ports.get(port, port)
        with suppress(OSError, TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(timeout):
                if "tcpSocket" in asked:
                    _, writer = await asyncio.open_connection(self.address, port)
                    writer.close()
                    return True
                url = f"http://{self.address}:{port}{question['path']}"
                async with aiohttp.ClientSession() as session, session.get(url) as answer:
                    return 200 <= answer.status < 400
        return False

    async def _grpc(self, question: Object, seconds: float) -> bool:
        async with grpc.aio.insecure_channel(f"{self.address}:{question['port']}") as channel:
            request = health_pb2.HealthCheckRequest(service=question["service"])
            try:
                check = health_pb2_grpc.HealthStub(channel).Check
                answer = await check(request, timeout=seconds)
            except grpc.aio.AioRpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def stop(self) -> tuple[int, float]:
        """Ends it as the kubelet does; returns the exit code and the seconds it took.

        It is killed after its grace period, and the exit code is then -9.
        """
        assert self._process is not None, "it was not started"
        started = time.monotonic()
        hook = self.main.get("lifecycle", {}).get("preStop", {}).get("sleep", {})
        await asyncio.sleep(hook.get("seconds", 0))
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self.grace_seconds - (time.monotonic() - started)):
                await self._process.wait()
        except TimeoutError:
            await self.kill()
        return await self.ended(), time.monotonic() - started

    def status(self) -> dict[str, str]:
        """Returns the kernel's status of the main container's process."""
        assert self._process is not None, "it was not started"
        lines = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8").splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def read_only_mounts(self) -> dict[str, bool]:
        """Where something is mounted in its container, and whether that is read-only."""
        assert self._process is not None, "it was not started"
        lines = Path(f"/proc/{self._process.pid}/mounts").read_text(encoding="utf-8").splitlines()
        return {each[1]: "ro" in each[3].split(",") for each in map(str.split, lines)}

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "it was not started"
        self._process.send_signal(number)

    async def kill(self) -> None:
        """SIGKILL. Fine when it has ended or was never started."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _run(self, container: Object) -> asyncio.subprocess.Process:
        root = self._folder / f"root-{container['name']}"
        root.mkdir(exist_ok=True)
        mounts = self._folder / f"mounts-{container['name']}"
        mounts.write_text("".join(self._content.mounts(container)), encoding="utf-8")
        with (self._folder / "log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *(*UNSHARE, str(SCRIPT), str(root), str(mounts), str(self._hosts)),
                *(*DROP, *self._content.command(container)),
                cwd="/",
                env=self._content.environment(container),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
