"""Uploads a finished folder to the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import UserError


def check_access(repo: str, overwrite: bool) -> None:
    """Raises UserError where `repo` (ORG/NAME) cannot be written, or holds files and `overwrite` is false.

    To be asked before the work, not after it; changes nothing on the hub.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    with plain_errors(repo):
        user = api.whoami()
        names = [user["name"], *(org["name"] for org in user.get("orgs", []))]
        if repo.count("/") != 1 or repo.partition("/")[0] not in names:
            raise UserError(f"--push {repo}: you may write below {', '.join(names)}; name it {names[0]}/NAME")
        try:
            files = set(api.list_repo_files(repo)) - {".gitattributes"}
        except RepositoryNotFoundError:
            return
    if files and not overwrite:
        raise UserError(f"--push {repo}: it holds {len(files)} files already; add --overwrite, or choose another name")


def upload(folder: Path, repo: str, *, ignore: list[str], delete: list[str] | None = None) -> str:
    """Uploads a folder as one commit and returns its address; a new repository is private.

    `ignore` are patterns of what stays here, `delete` of what leaves the repository unless it is sent anew.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with plain_errors(repo):
        api.create_repo(repo, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            ignore_patterns=ignore,
            delete_patterns=delete,
            commit_message=f"Upload {folder.parent.name}",
        )
    return commit.commit_url


@contextmanager
def plain_errors(repo: str) -> Iterator[None]:
    """What the hub or the network refuses, as a UserError."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    token = "run `hf auth login` with a token that may write, or set HF_TOKEN to it"
    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError(f"--push {repo}: you are not logged in to the hub; {token}") from None
    except HFValidationError as error:
        raise UserError(f"--push {repo}: {error}; name it ORG/NAME") from None
    except OfflineModeIsEnabled:
        raise UserError(f"--push {repo}: HF_HUB_OFFLINE is set; unset it to upload") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        mend = token if status in (401, 403) else "try again later with --push; the folder is whole"
        raise UserError(f"--push {repo}: the hub answered {status} ({error.server_message or error}); {mend}") from None
    except httpx.TransportError as error:
        raise UserError(
            f"--push {repo}: the hub cannot be reached ({error}); check the network, or HF_ENDPOINT"
        ) from None
