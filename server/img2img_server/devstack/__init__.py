"""The engines of `local`: nats-server and an S3 server as supervised child processes."""

from img2img_server.devstack.child import EngineDiedError, EnginesError
from img2img_server.devstack.servers import LocalEngines

__all__ = ["EngineDiedError", "EnginesError", "LocalEngines"]
