"""Models of the Hugging Face hub: `hf:ORG/NAME[@REVISION][/FILE]` becomes files on this machine.

They come into the cache of the hub's own library, by its variables and its token. The library
fetches small files. Weights that the hub names by their sha256 are fetched here, over plain HTTP: a
download that was cut goes on where it ended, where the library would begin anew.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from cmtool.errors import InputError, MissingError, ResourceError, UserError, is_full
from cmtool.system.files import file_sha256, write_atomic
from cmtool.weights import OFFLINE, is_offline

PREFIX = "hf:"
FORM = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@(refs/[\w-]+/[\w-]+|[\w.-]+))?(?:/([^@]+))?")
NETWORKS = (
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.bin",
)  # fmt: skip
"""Weights of a diffusers network, the best first."""
CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""Packages by which the hub's library may speak to it; their errors are not all OSErrors."""
SINGLE = (".safetensors", ".pt", ".pth", ".pkl", ".msgpack")
OLD_NORM = (
    "the .bin of ImageNet 64x64 is older than a fix of its attention: a .safetensors beside it, or"
    " a newer revision, gives better pictures"
)


class Named(NamedTuple):
    """What a name says: the repository, and the revision and file where it names them."""

    repository: str
    revision: str | None
    file: str | None


class Fetched(NamedTuple):
    """A model of the hub on this machine; `source` names its commit."""

    path: Path
    source: str
    notes: tuple[str, ...]


class Listed(NamedTuple):
    """A repository at a commit: the sha256 of its files by name, None where the hub has none."""

    commit: str
    files: Mapping[str, str | None]


def parsed(name: str) -> Named:
    """Return what `hf:ORG/NAME[@REVISION][/FILE]` names. Raises UserError."""
    match = FORM.fullmatch(name)
    if match is None:
        hint = "write hf:ORG/NAME, hf:ORG/NAME@REVISION or hf:ORG/NAME/FILE"
        raise UserError(f"{name} names no model of a hub", hint)
    return Named(*match.groups())


def fetched(name: str) -> Fetched:
    """Return a model of the hub, whose files are fetched unless they are in the hub's cache.

    Raises UserError for a name that is none, MissingError without the hub's library or a network,
    InputError for what the hub has not or refuses, ResourceError for what the machine has not.
    """
    named = parsed(name)
    with told(name):
        listed = _in_cache(named) if is_offline() else _at_hub(named)
        files = _chosen(name, named, list(listed.files))
        before = _commit_in_cache(named)
        paths = [_file(named, listed, file) for file in files]
        if listed.commit not in (before, named.revision):
            write_atomic(_reference(named), listed.commit.encode())
    notes = []
    if before not in (None, listed.commit):
        notes.append(
            f"{named.repository}: {named.revision or 'main'} moved from {before[:12]} to"
            f" {listed.commit[:12]} since it was fetched last"
        )
    if "imagenet64" in name and any(file.endswith(".bin") for file in files):
        notes.append(OLD_NORM)
    root = paths[0]
    for _ in PurePosixPath(files[0]).parts:
        root = root.parent
    is_single = len(files) == 1
    where = paths[0] if is_single else root
    source = f"{PREFIX}{named.repository}@{listed.commit}" + f"/{files[0]}" * is_single
    return Fetched(where, source, tuple(notes))


def _chosen(name: str, named: Named, files: Sequence[str]) -> list[str]:
    """Return the files of a repository that make the model. Raises InputError."""
    for file in files:
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or "\\" in file:
            raise InputError(f"{name} has a file with the name {file!r}", "choose another model")
    if named.file is not None:
        if named.file not in files:
            shown = ", ".join(sorted(files)[:12]) or "nothing"
            raise InputError(f"{named.repository} has no file {named.file}", f"it has {shown}")
        return [named.file]
    for folder in ("unet/", ""):
        if f"{folder}config.json" not in files:
            continue
        for weights in NETWORKS:
            if f"{folder}{weights}" in files:
                about = ["model_index.json", "scheduler/scheduler_config.json"]
                beside = [file for file in about if file in files]
                shards = [f for f in files if _is_shard(f, folder) and weights.endswith(".json")]
                return [*beside, f"{folder}config.json", f"{folder}{weights}", *sorted(shards)]
    single = sorted(f for f in files if f.endswith(SINGLE) and "/" not in f)
    if len(single) != 1:
        what = f"{named.repository} has {len(single) or 'no'} weight files that cmtool reads"
        hint = (
            f"name one: -c {PREFIX}{named.repository}/{single[0]}" if single else "choose another"
        )
        raise InputError(what, hint)
    return single


def _is_shard(file: str, folder: str) -> bool:
    name = re.escape("diffusion_pytorch_model")
    return re.fullmatch(rf"{re.escape(folder)}{name}-\d+-of-\d+\.safetensors", file) is not None


def library() -> Any:
    """Return the hub's library. Raises MissingError without it."""
    try:
        import huggingface_hub
    except ImportError:
        what = "models of the hub need the package huggingface_hub"
        raise MissingError(what, "pip install 'cmtool[hub]'") from None
    return huggingface_hub


def places() -> dict[str, str | None]:
    """Return the server and the cache by the hub's variables as they are now."""
    home = os.environ.get("HF_HOME")
    cache = os.environ.get("HF_HUB_CACHE") or (f"{home}/hub" if home else None)
    return {"endpoint": os.environ.get("HF_ENDPOINT"), "cache_dir": cache}


def _at_hub(named: Named) -> Listed:
    """Return what the hub has of a repository."""
    hub = library()
    api = hub.HfApi(endpoint=places()["endpoint"])
    try:
        info = api.model_info(named.repository, revision=named.revision, files_metadata=True)
        files = {each.rfilename: each.lfs.sha256 if each.lfs else None for each in info.siblings}
        commit = str(info.sha)
    except hub.errors.HFValidationError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):  # a page, or another program's JSON
        what = f"what answers for {PREFIX}{named.repository} is no hub"
        raise InputError(what, "check HF_ENDPOINT, and whether a login page is between") from None
    return Listed(commit, files)


def _repository_in_cache(named: Named) -> Path:
    cache = places()["cache_dir"] or library().constants.HF_HUB_CACHE
    return Path(cache) / f"models--{named.repository.replace('/', '--')}"


def _reference(named: Named) -> Path:
    """Return the file of the cache that has the commit of a revision; its folder is made."""
    path = _repository_in_cache(named) / "refs" / (named.revision or "main")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _commit_in_cache(named: Named) -> str | None:
    """Return the commit of the revision when it was fetched last, if it was."""
    try:
        return _reference(named).read_text()
    except (OSError, ValueError):
        return None


def _in_cache(named: Named) -> Listed:
    """Return what the cache has of a repository. Raises MissingError."""
    commit = _commit_in_cache(named) or named.revision or "main"
    snapshot = _repository_in_cache(named) / "snapshots" / commit
    files = [path for path in snapshot.rglob("*") if path.is_file()]
    if not files:
        offline = next(v for v in OFFLINE if os.environ.get(v, "") not in ("", "0"))
        what = f"{PREFIX}{named.repository} is not in the hub's cache, and {offline} is set"
        raise MissingError(what, f"fetch it first with a network: {offline}=0")
    return Listed(commit, {path.relative_to(snapshot).as_posix(): None for path in files})


def _file(named: Named, listed: Listed, file: str) -> Path:
    """Return one file, fetched at the commit and checked, unless it is in the cache."""
    hub, where = library(), places()
    known = {"revision": listed.commit, "cache_dir": where["cache_dir"]}
    cached = hub.try_to_load_from_cache(named.repository, file, **known)
    if isinstance(cached, str):
        return Path(cached)
    if is_offline():
        raise MissingError(f"{file} of {named.repository} is not in the hub's cache", "fetch it")
    expected = listed.files.get(file)
    is_checked = expected is not None and _fetched_here(named, listed.commit, file, expected)
    path = Path(hub.hf_hub_download(named.repository, file, **known, endpoint=where["endpoint"]))
    if expected is None or is_checked:
        return path
    if (found := file_sha256(path)) != expected:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        what = f"{file} of {named.repository} came as another file: its sha256 is {found[:12]}..."
        raise InputError(what, "try again: it was removed")
    return path


def _fetched_here(named: Named, commit: str, file: str, sha256: str) -> bool:
    """Fetch weights to where the cache of the hub's library has them: under their sha256.

    Returns False, with nothing fetched, for a server that names its files otherwise, and for a file
    that is there.
    """
    from cmtool.system.download import download

    hub, endpoint = library(), places()["endpoint"]
    url = hub.hf_hub_url(named.repository, file, revision=commit, endpoint=endpoint)
    headers = hub.utils.build_hf_headers()
    if re.fullmatch("[0-9a-f]{64}", sha256) is None:  # it becomes the name of a file
        return False
    blob = _repository_in_cache(named) / "blobs" / sha256
    if blob.is_file() or hub.get_hf_file_metadata(url, headers=headers).etag != sha256:
        return False
    with hub.utils.tqdm(desc=file, unit="B", unit_scale=True, disable=None) as bar:

        def progress(_: str, done: float, total: int) -> None:
            bar.total = total or None
            bar.update(done - bar.n)

        download(url, blob, sha256=sha256, headers=headers, progress=progress)
    return True


@contextmanager
def told(name: str) -> Iterator[None]:
    """Turn what the hub's library raises in the block into errors of ours."""
    try:
        yield
    except OSError as error:
        raise _error_of(error, name) from None
    except ValueError as error:  # of names that the hub does not allow
        if type(error).__name__ != "HFValidationError":
            raise
        raise UserError(f"{name} names no model of a hub", str(error).splitlines()[0]) from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in CLIENTS:
            raise
        raise _no_answer(name, error) from None


def _error_of(error: OSError, name: str) -> Exception:
    errors = library().errors
    if is_full(error):
        return ResourceError(f"no room on the disk for {name}", "free disk space, and try again")
    if isinstance(error, errors.GatedRepoError):
        hint = "accept its terms on the hub, and put a token into HF_TOKEN"
        return InputError(f"{name} is gated", hint)
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{name}: there is no such revision", "leave @REVISION out")
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "check the name; a private one needs a token in HF_TOKEN"
        return InputError(f"{name}: there is no such model", hint)
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            hint = "put a token that may do it into HF_TOKEN, or: hf auth login"
            return InputError(f"the hub does not allow it for {name}: {status}", hint)
        return InputError(f"the hub answers {status or 'an error'} for {name}", "try again later")
    return _no_answer(name, error)


def _no_answer(name: str, error: Exception) -> ResourceError:
    what = f"no whole answer from the hub for {name}: {error}"
    return ResourceError(what, "try again; check the network, and HF_ENDPOINT if it is set")
