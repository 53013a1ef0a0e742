"""Models of the Hugging Face hub by their names, downloaded into huggingface_hub's cache. Only safetensors and GGUF.

Small files come first, so that what tritkit cannot run is refused before gigabytes are on their way. huggingface_hub
compares sizes alone; here each file is compared with the checksum that the hub has for it.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .checkpoint import read_config
from .jsonfile import read_object
from .progress import progress
from .tokenizer import Tokenizer

BESIDE = (".json", ".jinja")  # what belongs to a model besides its weights, by ending
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
CHUNK = 1 << 22


class RemoteFile(NamedTuple):
    """A file of a repository. checksum: SHA-256 in hexadecimal, or git's name of the file where that is shorter."""

    name: str
    size: int
    checksum: str | None


def download(repo_id: str, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of a model in the cache, or the file of one: ``repo_id`` is owner/name or owner/name/file.gguf.

    revision: a branch, tag or commit (none: main). What is in the cache already is not downloaded again, and with
    HF_HUB_OFFLINE=1 nothing is asked of the hub. ValueError or OSError, one sentence, where that does not work.
    """
    owner, name, *inner = repo_id.split("/", 2)
    repo = Repository(f"{owner}/{name}", revision, token)
    with _one_sentence(repo):
        return repo.file(inner[0]) if inner else repo.folder()


class Repository:
    """One revision of a repository of models. ``files``: what it has; None where the hub was not asked."""

    def __init__(self, name: str, revision: str | None, token: str | None):
        self.name, self.revision, self.token = name, revision, token
        self.files: dict[str, RemoteFile] | None = None
        self.commit: str | None = None

    def _look(self, needed: str = "config.json") -> None:
        """Ask the hub what there is; where it cannot be reached, be content with the cache if it has ``needed``."""
        if constants.HF_HUB_OFFLINE:
            return
        try:
            info = HfApi(token=self.token).model_info(self.name, revision=self.revision, files_metadata=True)
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code < 500:
                raise
            self._fall_back(error, needed)
            return
        except (HTTPError, OSError) as error:  # no connection
            self._fall_back(error, needed)
            return
        self.commit = info.sha
        self.files = {}
        for file in info.siblings or ():
            checksum = file.blob_id if file.lfs is None else file.lfs.sha256
            self.files[file.rfilename] = RemoteFile(file.rfilename, file.size or 0, checksum)

    def _fall_back(self, error: Exception, needed: str) -> None:
        found = try_to_load_from_cache(self.name, needed, revision=self.revision)
        if not isinstance(found, str):
            raise error
        print(f"tritkit: {_unreachable(error)}; taking {self.name} from the cache", file=sys.stderr)

    def file(self, name: str) -> Path:
        """One file, a GGUF file."""
        self._look(name)
        if self.files is not None and name not in self.files:
            raise ValueError(f"{self.name} has no file {name}{self._gguf_files()}")
        self._require_room([name])
        offline = self.files is None
        path = hf_hub_download(
            self.name, name, revision=self.revision, token=self.token, local_files_only=offline, library_name="tritkit"
        )
        self._check(Path(path.removesuffix(name)), [name])
        return Path(path)

    def folder(self) -> Path:
        """Everything that a model folder has."""
        self._look()
        if self.files is None:
            folder = self._fetch(["config.json"])
            names = [f.name for f in folder.iterdir()]
        else:
            self._require_safetensors()
            names = [n for n in self.files if ("/" not in n and n.endswith(BESIDE)) or n.startswith("LICENSE")]
            folder = self._fetch(names)
        self._check(folder, names)
        read_config(folder)  # the architecture, before its weights
        Tokenizer.load(folder)
        if self.files is not None:
            weights = ["model.safetensors"]
            if weights[0] not in self.files:
                index = read_object(folder / "model.safetensors.index.json").get("weight_map")
                weights = sorted({str(file) for file in index.values()}) if isinstance(index, dict) else []
            self._require_room(weights)
            self._fetch(weights)
            self._check(folder, weights)
        return folder

    def _fetch(self, names: list[str]) -> Path:
        return Path(
            snapshot_download(
                self.name,
                revision=self.revision,
                token=self.token,
                allow_patterns=[glob.escape(name) for name in names],
                local_files_only=self.files is None,
                library_name="tritkit",
            )
        )

    def _require_safetensors(self) -> None:
        """ValueError that says what a repository has instead of a model in safetensors."""
        files = self.files or {}
        if "config.json" in files and ("model.safetensors" in files or "model.safetensors.index.json" in files):
            return
        if any(name.endswith(".gguf") for name in files):
            raise ValueError(f"{self.name} has no safetensors{self._gguf_files()}")
        pickles = [name for name in files if name.endswith(PICKLES)]
        if pickles and "config.json" in files:
            raise ValueError(
                f"{self.name} has its weights only as a pickle ({pickles[0]}), which could run any code when it is "
                "read; tritkit reads safetensors"
            )
        missing = "model.safetensors" if "config.json" in files else "config.json"
        raise ValueError(f"{self.name} is no language model that tritkit reads: it has no {missing}")

    def _gguf_files(self) -> str:
        """The end of a sentence: which GGUF files there are, and how to ask for one."""
        found = sorted(name for name in self.files or () if name.endswith(".gguf"))
        if not found:
            return ""
        shown = ", ".join(found[:20]) + (f" and {len(found) - 20} more" if len(found) > 20 else "")
        return f"; its GGUF files are {shown}: name one, as in tritkit import {self.name}/{found[0]} OUT"

    def _require_room(self, names: list[str]) -> None:
        """OSError where the disk is too full for those of the files that are not in the cache."""
        if self.files is None:
            return
        missing = [n for n in names if not isinstance(try_to_load_from_cache(self.name, n, revision=self.commit), str)]
        needed = sum(self.files[name].size for name in missing if name in self.files)
        folder = Path(constants.HF_HUB_CACHE)
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if needed > free:
            what = f"{self.name} needs {needed / 1e9:.1f} GB more, but the disk has {free / 1e9:.1f} GB left"
            raise OSError(errno.ENOSPC, what, constants.HF_HUB_CACHE)

    def _check(self, folder: Path, names: list[str]) -> None:
        """OSError where a file is not what the hub says it is; then it is not in the cache any more."""
        files = self.files or {}
        sizes = {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}
        total = sum(sizes.values())
        if total < 64 * CHUNK:
            advance: Callable[..., None] = lambda amount: None  # noqa: E731
            self._compare(folder, sizes, files, advance)
            return
        with progress(f"check {self.name}", total, "B") as advance:
            self._compare(folder, sizes, files, advance)

    def _compare(
        self, folder: Path, sizes: dict[str, int], files: dict[str, RemoteFile], advance: Callable[..., None]
    ) -> None:
        for name, size in sizes.items():
            path = folder / name
            wanted = files[name].checksum if name in files else path.resolve().name  # the cache's name of a file
            if wanted is None or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", wanted):
                continue
            found = checksum(path, size, len(wanted), advance)
            if found != wanted:
                path.resolve().unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                raise OSError(
                    f"{name} of {self.name} is damaged: its checksum is {found}, but the hub has {wanted}; it was "
                    "removed from the cache, the same command downloads it again"
                )


def checksum(path: Path, size: int, digits: int, advance: Callable[..., None] = lambda amount: None) -> str:
    """SHA-256 of a file (64 digits), or git's name of it (40): SHA-1 of a line with its length and of its bytes."""
    prefix = b"" if digits == 64 else b"blob %d\0" % size
    digest = hashlib.new("sha256" if digits == 64 else "sha1", prefix, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _unreachable(error: Exception) -> str:
    response = getattr(error, "response", None)
    what = f"answers with status {response.status_code}" if response is not None else "cannot be reached"
    detail = "" if response is not None or not str(error) else f" ({_first_line(error)})"
    return f"the hub at {constants.ENDPOINT} {what}{detail}"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _one_sentence(repo: Repository) -> Iterator[None]:
    """What huggingface_hub raises in paragraphs, said in one sentence."""
    name, revision = repo.name, repo.revision or constants.DEFAULT_REVISION
    token = "another --token" if repo.token else "--token, or log in with `hf auth login`"
    try:
        yield
    except GatedRepoError:
        raise ValueError(f"{name} is gated: accept its terms at {constants.ENDPOINT}/{name} and give {token}") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"the hub has no model {name}, or it is private and not for you to see (then give {token})"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{name} has no revision {revision}") from None
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise OSError(f"HF_HUB_OFFLINE is set, and {name} ({revision}) is not complete in the cache") from None
        raise OSError(f"{name} could not be downloaded: {_unreachable(error.__cause__ or error)}") from None  # type: ignore[arg-type]
    except EntryNotFoundError as error:
        raise ValueError(f"{name} ({revision}) lacks a file: {_first_line(error)}") from None
    except HFValidationError as error:
        raise ValueError(f"{name} is no name of a model: {_first_line(error)}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise ValueError(f"the hub refuses access to {name} (status {status}): give {token}") from None
        raise OSError(f"{name} could not be downloaded: {_unreachable(error)}") from None
    except HTTPError as error:
        raise OSError(f"{name} could not be downloaded: {_unreachable(error)}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise OSError(f"{name} could not be downloaded: {_first_line(error)}") from None
