"""The img2img service: roles api, gateway, worker and local."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("img2img-service")
except PackageNotFoundError:  # a checkout on PYTHONPATH
    __version__ = "0+unknown"
