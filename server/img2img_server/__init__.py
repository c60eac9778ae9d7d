"""The img2img service: roles api, gateway, worker and local."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("img2img-service")
except PackageNotFoundError:  # A checkout on PYTHONPATH has no version.
    __version__ = "0+unknown"
