"""The img2img service: roles api, gateway, worker and local."""

from importlib.metadata import version

__version__ = version("img2img-service")
