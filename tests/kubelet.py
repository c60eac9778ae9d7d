"""Runs pods of rendered manifests as processes, with the behaviour of a kubelet. It also runs the
services of the Compose file, which tests/compose.py describes as pods.

A container has the command, environment, probes, volumes and read-only root of the manifest. If the
tests run as root, it also has the user and no capabilities (tests/pod_root.sh). Each pod has its
own address in 127.0.0.0/8, and the names of Services resolve to it, so all ports are unchanged.
There are two differences: a container that would listen on all addresses listens on the pod's
address only, and S3 has another port, because weed does not start if its port is used on any
address of the machine.
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
    """Returns why this machine cannot run pods, or "" if it can."""
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
        # A random part of loopback, so that two test runs at the same time do not collide.
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
        """Kills all processes that still run."""
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
        """Returns the output of all containers."""
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
        """Returns the exit code of the main container."""
        assert self._process is not None, "it was not started"
        return await self._process.wait()

    async def ready(self) -> None:
        """Returns when the startup probe and then the readiness probe succeed."""
        for kind in ("startup", "readiness"):
            if f"{kind}Probe" in self.main:
                await self.until(kind, True)

    async def until(self, kind: str, content: bool) -> None:
        """Returns when a probe has this result. Raises AssertionError with the log on a timeout."""
        assert self._process is not None, "it was not started"
        deadline = time.monotonic() + READY_SECONDS
        while await self.probe(kind) != content:
            assert self._process.returncode is None or not content, self.log
            assert time.monotonic() < deadline, self.log
            await asyncio.sleep(POLL_SECONDS)

    async def probe(self, kind: str) -> bool:
        """Returns whether a probe succeeds: startup, readiness or liveness."""
        asked = self.main[f"{kind}Probe"]
        timeout = asked.get("timeoutSeconds", 1)
        if "exec" in asked:
            return await self._execute(asked["exec"]["command"], timeout)
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

    async def _execute(self, command: list[str], seconds: float) -> bool:
        """Returns whether a command ends with status 0 in time, in the container's environment."""
        process = await asyncio.create_subprocess_exec(
            *map(self._content.own, command),
            env=self._content.environment(self.main),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(seconds):
                return await process.wait() == 0
        except TimeoutError:
            return False
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

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
        """Stops the pod as the kubelet does. Returns the exit code and the seconds that the stop
        took. After its grace period the pod is killed, and the exit code is -9.
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
        """Returns the mount points in the container, and whether each is read-only."""
        assert self._process is not None, "it was not started"
        lines = Path(f"/proc/{self._process.pid}/mounts").read_text(encoding="utf-8").splitlines()
        return {each[1]: "ro" in each[3].split(",") for each in map(str.split, lines)}

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "it was not started"
        self._process.send_signal(number)

    async def kill(self) -> None:
        """Sends SIGKILL. Does nothing if the process has ended or was never started."""
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
