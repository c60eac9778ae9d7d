"""Downloads models of a Hugging Face hub. The hub's library reads its own variables (HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE) and keeps files in its cache. Importing it takes a second, so functions
import it themselves.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from img2img_server.domain.hub_id import HubId
from img2img_server.engine.family import INDEX, ModelError, ModelFiles
from img2img_server.engine.weight_files import choose_weights, refuse_pickle

if TYPE_CHECKING:
    from collections.abc import Iterator

# A hub that has not answered after this time is reported. A download has no limit while bytes
# arrive.
ANSWER_SECONDS: Final = 30.0
_REQUEST_SECONDS: Final = 10.0
_PROGRESS_SECONDS: Final = 10.0
_THREADS: Final = 4
_SMALL: Final = (".json", ".txt", ".jinja", ".model")
_CONFIGS: Final = re.compile(
    r"model_index\.json|img2img\.toml|[^/]+/(config|scheduler_config)\.json"
)

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Progress:
    """Counts the downloaded bytes of all threads."""

    total: int
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, count: float | None) -> None:
        with self.lock:
            self.done += int(count or 0)


@dataclass(frozen=True, slots=True)
class _Listing:
    """The files of a revision, with their sizes; a size of 0 is unknown."""

    commit: str
    sizes: Mapping[str, int]


def download_model(
    hub_id: HubId,
    needed_parts: Callable[[ModelFiles], Collection[str]],
    *,
    local_dir: Path | None = None,
    allow_pickles: bool = False,
) -> Path:
    """Downloads the files of a model that are loaded, and no others. Blocks.

    If the hub cannot be reached, the files that an earlier download left in the cache are used.

    Args:
        needed_parts: Returns the parts that are loaded; it may raise ModelError, before any weights
            are downloaded.
        local_dir: The folder to download to; None: the cache of the hub's library.

    Returns:
        The folder with the files.

    Raises:
        ModelError: The model cannot be downloaded; the sentence says why.
    """
    listing = _listing_or_cache(hub_id, local_dir)
    if isinstance(listing, _Cached):
        _check_cached(hub_id, listing, needed_parts(ModelFiles.read(listing.folder)))
        return listing.folder
    if INDEX not in listing.sizes:
        files = sorted(name for name in listing.sizes if "/" not in name and "." in name)
        raise ModelError(
            f"{hub_id} is no diffusers model: it has no {INDEX}, only {', '.join(files[:8])}: name "
            "a model in diffusers' layout, or download a single file and name its path"
        )
    with _sentences(hub_id):
        folder = _download(hub_id, listing, filter(_CONFIGS.fullmatch, listing.sizes), local_dir)
        parts = needed_parts(ModelFiles.read(folder))
        wanted = [
            name for part in parts for name in _part_files(hub_id, part, listing, allow_pickles)
        ]
        return _download(hub_id, listing, wanted, local_dir)


def download_file(hub_id: HubId, name: str) -> Path:
    """Returns the path of a file of a model in the cache, after its download. Blocks.

    Raises:
        ModelError: It cannot be downloaded; the sentence says why.
    """
    from huggingface_hub import hf_hub_download

    def call() -> str:
        return hf_hub_download(
            hub_id.repo, name, revision=hub_id.revision or None, etag_timeout=_REQUEST_SECONDS
        )

    with _sentences(hub_id):
        return Path(_within(ANSWER_SECONDS, call))


def _has_weights(part: str, names: Collection[str]) -> bool:
    """Returns whether a part is a network, by the files in its folder."""
    return "config.json" in names and not part.startswith("tokenizer")


def _check_cached(hub_id: HubId, cached: _Cached, parts: Collection[str]) -> None:
    """Raises ModelError if an earlier download left the cache without a part or its weights."""
    for part in sorted(parts):
        folder = cached.folder / part
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        weights = choose_weights(names)
        if not names or (_has_weights(part, names) and not (weights and weights.is_whole)):
            raise ModelError(
                f"the cache of the hub's library lacks files of the {part} of {hub_id}, and "
                f"{cached.why}"
            )


def _part_files(hub_id: HubId, part: str, listing: _Listing, allow_pickles: bool) -> list[str]:
    """Returns the small files and the weights of a part."""
    start = f"{part}/"
    names = [name.removeprefix(start) for name in listing.sizes if name.startswith(start)]
    names = [name for name in names if "/" not in name]
    wanted = [name for name in names if name.endswith(_SMALL) and ".index." not in name]
    weights = choose_weights(names)
    if weights is None and _has_weights(part, names):
        others = ", ".join(sorted(set(names) - set(wanted))) or "none"
        raise ModelError(
            f"{hub_id} has no weights of the {part} that can be read; its other files there are "
            f"{others[:200]}: name a model with .safetensors files"
        )
    if weights:
        if weights.is_pickle:
            refuse_pickle(Path(start + weights.files[0]), allow_pickles)
        wanted += [*weights.files, *filter(None, [weights.index])]
    return [start + name for name in wanted]


@dataclass(frozen=True, slots=True)
class _Cached:
    """A model in the cache of the hub's library. `why`: why nothing can be downloaded."""

    folder: Path
    why: str


def _listing_or_cache(hub_id: HubId, local_dir: Path | None) -> _Listing | _Cached:
    """Returns the files of a model at the hub, or the folder of the cache if the hub is away."""
    from huggingface_hub import constants, snapshot_download

    failure: ModelError | None = None
    if not constants.HF_HUB_OFFLINE:
        try:
            return _listing(hub_id)
        except _AwayError as error:
            failure = error
    if local_dir is None:
        with suppress(OSError, ValueError):
            found = Path(
                snapshot_download(
                    hub_id.repo,
                    revision=hub_id.revision or None,
                    local_files_only=True,
                    allow_patterns=[INDEX],
                )
            )
            if (found / INDEX).is_file():
                if failure is not None:
                    _log.warning("hub_unavailable_cache_used: %s", failure)
                return _Cached(found, str(failure or "HF_HUB_OFFLINE is set: unset it"))
    raise failure or ModelError(
        f"{hub_id} is not in the cache of the hub's library, and HF_HUB_OFFLINE is set: unset it, "
        "or fetch the model into a folder with `img2img-server fetch-model`"
    )


class _AwayError(ModelError):
    """The hub cannot be reached or cannot answer now."""


def _listing(hub_id: HubId) -> _Listing:
    from huggingface_hub import HfApi

    def ask() -> Any:
        return HfApi().model_info(
            hub_id.repo,
            revision=hub_id.revision or "main",
            files_metadata=True,
            timeout=_REQUEST_SECONDS,
        )

    with _sentences(hub_id):
        info = _within(ANSWER_SECONDS, ask)
    sizes = {each.rfilename: int(each.size or 0) for each in info.siblings or ()}
    return _Listing(str(info.sha), sizes)


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Returns the result of a call. Raises TimeoutError if it takes longer."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    # A daemon thread does not keep the process from ending.
    threading.Thread(target=run, name="hub", daemon=True).start()
    try:
        return result.result(seconds)
    except FutureTimeoutError:
        raise TimeoutError(f"no complete answer in {seconds:.0f} s") from None


@contextmanager
def _sentences(hub_id: HubId) -> Iterator[None]:
    """Turns the errors of the hub's library into one sentence each."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise explain_hub(hub_id, error) from error


def explain_hub(hub_id: HubId, error: Exception) -> ModelError:
    """Returns the error with a sentence that says what happened and what to do."""
    import httpx2
    from huggingface_hub import constants, errors, get_token

    if isinstance(error.__cause__, httpx2.HTTPError) and isinstance(
        error, errors.LocalEntryNotFoundError
    ):
        error = error.__cause__
    endpoint = constants.ENDPOINT
    response = getattr(error, "response", None)
    status = int(getattr(response, "status_code", 0) or 0)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _AwayError(f"{hub_id} cannot be downloaded, because HF_HUB_OFFLINE is set: unset it")
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(
            f"{hub_id.repo} has no revision {hub_id.revision or 'main'} at {endpoint}: "
            "name a branch, a tag or a commit that it has"
        )
    if isinstance(error, errors.GatedRepoError) or (status == 403 and get_token()):
        how = (
            f"ask for access on its page, {endpoint}/{hub_id.repo}, with the account of HF_TOKEN"
            if get_token()
            else f"ask for access on its page, {endpoint}/{hub_id.repo}, and set HF_TOKEN"
        )
        return ModelError(f"{hub_id} is gated, and this access was refused ({status}): {how}")
    if status == 401 and get_token():
        return ModelError(
            f"{hub_id} cannot be downloaded: {endpoint} refused the token in HF_TOKEN (401): set a "
            "valid one"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        token = "" if get_token() else "; for a private model, set HF_TOKEN"
        return ModelError(
            f"there is no model {hub_id.repo} at {endpoint}, and no folder of this name on this "
            f"machine: check the name{token}"
        )
    if isinstance(error, errors.HFValidationError):
        return ModelError(f"{hub_id} is no hub id: {_line(error)}")
    if status == 429:
        return _AwayError(
            f"{hub_id} cannot be downloaded: {endpoint} limits the number of requests (429): wait, "
            "or set HF_TOKEN"
        )
    if status >= 500:
        return _AwayError(
            f"{hub_id} cannot be downloaded: {endpoint} is out of order ({status}): try again later"
        )
    if isinstance(error, TimeoutError | httpx2.TimeoutException):
        return _AwayError(
            f"{hub_id} cannot be downloaded: {endpoint} did not answer in time "
            f"({_line(error)}): try again later, or check the network"
        )
    if isinstance(error, httpx2.TransportError):
        return _AwayError(
            f"{hub_id} cannot be downloaded: no connection to {endpoint} ({_line(error)}): check "
            "the network, HF_ENDPOINT and the proxy variables. No folder here has this name, so "
            "the hub was asked"
        )
    if isinstance(error, OSError) and error.errno:
        return ModelError(f"{hub_id} cannot be stored: {error.strerror} ({error.filename})")
    return ModelError(f"{hub_id} cannot be downloaded: {type(error).__name__}: {_line(error)}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _download(hub_id: HubId, listing: _Listing, names: Any, local_dir: Path | None) -> Path:
    """Downloads files that are not there yet; logs the progress. Returns their folder."""
    from huggingface_hub import hf_hub_download

    tqdm: Any = import_module("huggingface_hub.utils").tqdm
    wanted = sorted(set(names))
    progress = _Progress(sum(listing.sizes[name] for name in wanted))

    class Counter(tqdm):  # type: ignore[misc]
        """A progress bar that shows nothing and counts bytes."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            progress.add(n)
            return None

    def one(name: str) -> Path:
        began = time.monotonic()
        path = hf_hub_download(
            hub_id.repo,
            name,
            revision=listing.commit,
            local_dir=local_dir,
            etag_timeout=_REQUEST_SECONDS,
            tqdm_class=Counter,
        )
        _log.debug("model_file_ready: %s after %.1f s", name, time.monotonic() - began)
        return Path(path).parents[name.count("/")]

    with _shown(hub_id, progress), ThreadPoolExecutor(_THREADS, "hub") as pool:
        folders = list(pool.map(one, wanted))
    if local_dir is None:
        _keep_revision(hub_id.revision or "main", listing.commit, folders[0])
    return folders[0]


def _keep_revision(revision: str, commit: str, snapshot: Path) -> None:
    """Notes the commit of a branch or tag in the cache, so that it is found without the hub."""
    if revision == commit:
        return
    note = snapshot.parents[1] / "refs" / revision
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(commit, encoding="utf-8")


@contextmanager
def _shown(hub_id: HubId, progress: _Progress) -> Iterator[None]:
    """Logs the progress at intervals while the body runs."""
    done = threading.Event()

    def show() -> None:
        while not done.wait(_PROGRESS_SECONDS):
            _log.info(
                "model_downloading: %s, %d of %d MiB",
                *(hub_id, progress.done // 2**20, progress.total // 2**20),
            )

    thread = threading.Thread(target=show, name="hub-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if progress.done:
        _log.info("model_downloaded: %s, %d MiB", hub_id, progress.done // 2**20)
