"""The types of init images and the errors about them. See prepare.py and fetch.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from img2img_server.domain.params import Limits

Pixels = npt.NDArray[np.uint8]  # height x width x 3, RGB
NOT_VALID = "init_image is not a valid PNG, JPG or WebP image"


class InvalidImageError(Exception):
    """The init image breaks a rule.

    Attributes:
        cause: What exactly is wrong, as a clause, where the sentence does not say it.
    """

    def __init__(self, sentence: str, cause: str = "") -> None:
        """Creates the error.

        Args:
            sentence: the HTTP contract's own words.
            cause: see the attribute.
        """
        super().__init__(sentence)
        self.cause = cause


def too_large(limits: Limits) -> InvalidImageError:
    """Returns the error of an image over the byte limit."""
    most = limits.max_image_bytes / 2**20
    return InvalidImageError(f"init_image must not be larger than {most:g} MB")


class FetchError(InvalidImageError):
    """The init image could not be fetched from its address.

    Attributes:
        cause: Why, as a clause for the caller, for example "the server answered 403". Names no
            IP address and no port that the caller did not send.
    """

    def __init__(self, cause: str = "") -> None:
        super().__init__("Unable to fetch image from provided URL", cause)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedImage:
    """An encoded init image that was proven to decode within the limits.

    `prepared`: it was re-encoded at the requested size and needs decoding only.
    """

    data: bytes
    prepared: bool
