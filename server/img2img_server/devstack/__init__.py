"""The servers of `local`: nats-server and an S3 server as supervised child processes."""

from img2img_server.devstack.child import LocalServersError, ServerExitedError
from img2img_server.devstack.servers import LocalServers

__all__ = ["LocalServers", "LocalServersError", "ServerExitedError"]
