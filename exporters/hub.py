"""An output uploaded to the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils._validators import validate_repo_id

from modelzip.checkpoints.errors import MachineError, OutputError, RecipeError

TRANSPORT: Final[type[Exception]] = HfHubHTTPError.__bases__[0]
"""HTTPError of httpx or httpx2, whichever this release of huggingface_hub is built on."""


@dataclass(frozen=True)
class Repository:
    """A model repository by its name, `owner/name`. private: as which it is made, where it isn't there yet."""

    name: str
    private: bool

    @classmethod
    def checked(cls, name: str, *, private: bool) -> Repository:
        """A repository that may be written to, as far as can be told before there is anything to write.

        A name without owner gets the user's. Raises RecipeError for a wrong name or a lacking login, MachineError if
        the Hub isn't there.
        """
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise RecipeError(f"--push-to-hub: {name} is no repository's name: write it as owner/name.") from None
        if get_token() is None:
            raise RecipeError("--push-to-hub: you aren't logged in: run `hf auth login`, or set HF_TOKEN.")
        try:
            user = HfApi().whoami()["name"]
        except HfHubHTTPError as error:
            raise RecipeError(
                f"--push-to-hub: the Hub didn't take your token ({_status(error)}): log in again."
            ) from None
        except (OfflineModeIsEnabled, OSError, TRANSPORT) as error:
            raise MachineError(f"--push-to-hub: the Hub can't be reached: {_first_line(error)}.") from None
        return cls(name if "/" in name else f"{user}/{name}", private)

    def push(self, folder: Path) -> str:
        """Upload all of the folder in one commit, and give the address. Raises OutputError if the Hub doesn't take it,
        MachineError if it isn't there."""
        api = HfApi()
        try:
            api.create_repo(self.name, private=self.private, exist_ok=True)
            api.upload_folder(repo_id=self.name, folder_path=folder, commit_message="Upload by modelzip")
        except HfHubHTTPError as error:
            raise OutputError(
                f"{folder} was written, but {self.name} didn't take it ({_status(error)}): may you write there?"
            ) from None
        except (OSError, TRANSPORT) as error:
            raise MachineError(f"{folder} was written, but the Hub can't be reached: {_first_line(error)}.") from None
        return f"{api.endpoint}/{self.name}"


def _status(error: HfHubHTTPError) -> str:
    return f"status {error.response.status_code}" if error.response is not None else _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
