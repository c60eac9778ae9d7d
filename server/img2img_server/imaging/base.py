"""The types of init images and the errors about them. See prepare.py and fetch.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from img2img_server.domain.params import Limits
from img2img_server.domain.violations import Reason, Violation

Pixels = npt.NDArray[np.uint8]  # height x width x 3, RGB


class InvalidImageError(Exception):
    """The init image breaks a rule; `violation` says which one."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(violation.text)
        self.violation = violation


class FetchError(InvalidImageError):
    """The init image could not be downloaded."""

    def __init__(self, cause: str = "") -> None:
        """Creates the error.

        Args:
            cause: The reason as a clause for the caller, for example "the server answered 403". It
                names no IP address and no port that the caller did not send.
        """
        message = "init_image cannot be downloaded"
        super().__init__(Violation("init_image", Reason.DOWNLOAD_FAILED, message, cause))


def not_an_image(cause: str) -> InvalidImageError:
    """Returns the error of data that cannot be decoded."""
    message = "init_image is not a valid PNG, JPEG or WebP image"
    return InvalidImageError(Violation("init_image", Reason.INVALID_IMAGE, message, cause))


def too_large(limits: Limits) -> InvalidImageError:
    """Returns the error of an image over the byte limit."""
    most = f"{limits.max_image_bytes / 2**20:g}"
    message = f"init_image must not be larger than {most} MB"
    values = {"max_megabytes": most}
    return InvalidImageError(Violation("init_image", Reason.TOO_MANY_BYTES, message, values=values))


def too_slow() -> InvalidImageError:
    """Returns the error of an image whose decoding reached the limit of CPU time."""
    return _too_expensive("it takes too long to decode; send it as an ordinary JPEG or PNG")


def too_much_memory(needed_bytes: int, most_bytes: int) -> InvalidImageError:
    """Returns the error of an image that needs more memory than one image may use."""
    needed, most = needed_bytes / 2**20, most_bytes / 2**20
    return _too_expensive(
        f"it needs too much memory to decode, {needed:.0f} MiB of at most {most:.0f} MiB; send it "
        "with fewer pixels, or as an ordinary JPEG"
    )


def _too_expensive(cause: str) -> InvalidImageError:
    message = "init_image cannot be decoded within the limits"
    return InvalidImageError(Violation("init_image", Reason.INVALID_IMAGE, message, cause))


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedImage:
    """An encoded init image that was proven to decode within the limits.

    `prepared`: the data was re-encoded at the requested size and only needs decoding.
    `width`, `height`: the size of the prepared image. `own_size`: width and height of the upright
    image before.
    """

    data: bytes
    prepared: bool
    width: int
    height: int
    own_size: tuple[int, int]
