"""Uploads a finished folder to the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import UserError
from runs import network


def check_access(repo: str, overwrite: bool) -> None:
    """Raises UserError where `repo` (ORG/NAME) cannot be written, or holds files and `overwrite` is false.

    To be asked before the work, not after it; changes nothing on the hub.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    network.check_environment()
    api = HfApi()
    with hub_errors_explained(repo):
        user = api.whoami()
        names = [user["name"], *(org["name"] for org in user.get("orgs", []))]
        if repo.count("/") != 1 or repo.partition("/")[0] not in names:
            raise UserError("push_namespace", repo=repo, names=names, first=names[0])
        try:
            files = set(api.list_repo_files(repo)) - {".gitattributes"}
        except RepositoryNotFoundError:
            return
    if files and not overwrite:
        raise UserError("push_repo_not_empty", repo=repo, count=len(files))


def upload(folder: Path, repo: str, *, ignore: list[str], delete: list[str] | None = None) -> str:
    """Uploads a folder as one commit and returns its address; a new repository is private.

    `ignore` are patterns of what stays here, `delete` of what leaves the repository unless it is sent anew.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_errors_explained(repo):
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
def hub_errors_explained(repo: str) -> Iterator[None]:
    """What the hub or the network refuses, as a UserError."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError("push_no_login", repo=repo) from None
    except HFValidationError as error:
        raise UserError("push_bad_name", repo=repo, reason=str(error)) from None
    except OfflineModeIsEnabled:
        raise UserError("push_offline", repo=repo) from None
    except HfHubHTTPError as error:
        status, reason = error.response.status_code, error.server_message or str(error)
        if status in (401, 403):
            raise UserError("push_refused", repo=repo, status=status, reason=reason) from None
        raise UserError("push_failed", repo=repo, status=status, reason=reason) from None
    except httpx.TransportError as error:
        raise UserError("push_unreachable", repo=repo, reason=str(error)) from None
