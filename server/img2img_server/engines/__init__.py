"""The engines of `local`: nats-server and an S3 server as supervised child processes."""

from img2img_server.engines.child import EngineDiedError, EnginesError
from img2img_server.engines.local import LocalEngines

__all__ = ["EngineDiedError", "EnginesError", "LocalEngines"]
