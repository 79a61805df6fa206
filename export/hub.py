"""Uploading a finished folder to the hub, and the head of a model's card."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import UserError
from runs import network


def card_head(folder: Path) -> dict[str, Any]:
    """The metadata at the head of a model's README.md (licence, base model); empty where there is none."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        return metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):  # a card is for people: a broken one stops nothing
        return {}


def check_access(repo: str, overwrite: bool) -> None:
    """Raises UserError where `repo` (ORG/NAME) cannot be written, or holds files and `overwrite` is false.

    Called before the model is made; changes nothing on the hub.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    network.check_environment()
    api = HfApi()
    with explained_errors(repo):
        user = api.whoami()
        names = [user["name"], *(org["name"] for org in user.get("orgs", []))]
        if repo.count("/") != 1 or repo.partition("/")[0] not in names:
            raise UserError("--push {repo}: name it OWNER/NAME, with one of the owners {names}", repo=repo, names=names)
        try:
            files = set(api.list_repo_files(repo)) - {".gitattributes"}
        except RepositoryNotFoundError:
            return
    if files and not overwrite:
        raise UserError("--push {repo}: the repository is not empty; add --overwrite, or choose another", repo=repo)


def upload(folder: Path, repo: str, *, ignore: list[str], delete: list[str] | None = None) -> str:
    """Uploads a folder as one commit and returns the commit's address; a new repository is private.

    Files that match `ignore` are not uploaded; files of the repository that match `delete` are deleted unless they are
    uploaded again.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with explained_errors(repo):
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
def explained_errors(repo: str) -> Iterator[None]:
    """Turns errors of the hub and of the network into UserErrors."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError("--push {repo}: not logged in; run `hf auth login`, or set HF_TOKEN", repo=repo) from None
    except HFValidationError as error:
        raise UserError("--push {repo}: {reason}; name it OWNER/NAME", repo=repo, reason=str(error)) from None
    except OfflineModeIsEnabled:
        raise UserError("--push {repo}: HF_HUB_OFFLINE is set; unset it to upload", repo=repo) from None
    except HfHubHTTPError as error:
        status, reason = error.response.status_code, error.server_message or str(error)
        if status in (401, 403):
            raise UserError(
                "--push {repo}: the hub answered {status} ({reason}); log in with a token that may write",
                repo=repo,
                status=status,
                reason=reason,
            ) from None
        raise UserError(
            "--push {repo}: the hub answered {status} ({reason}); repeat the command later, all files are kept",
            repo=repo,
            status=status,
            reason=reason,
        ) from None
    except httpx.TransportError as error:
        raise UserError(
            "--push {repo}: the hub cannot be reached ({reason}); check the network, or HF_ENDPOINT",
            repo=repo,
            reason=str(error),
        ) from None
