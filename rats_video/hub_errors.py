"""What the errors of the model hub's client mean to its user."""

from __future__ import annotations

import errno
from typing import Any

from rats_video.errors import first_line

_LOG_IN = "`hf auth login` or set HF_TOKEN"


def refusal(error: BaseException, repository: str, revision: str | None = None) -> tuple[str, str] | None:
    """What is wrong, a clause, and how to mend it; None for an error that is not the hub's."""
    from huggingface_hub import constants, errors

    found = None
    match error := _unwrapped(error):
        case errors.HfHubHTTPError():
            found = _answered(error, repository, revision)
        case errors.OfflineModeIsEnabled():
            found = "HF_HUB_OFFLINE is set, and the hub's cache does not have it", "unset it, or give a folder"
        case errors.LocalTokenNotFoundError():
            found = "no token for the hub", _LOG_IN
        case OSError() if error.filename is not None or error.errno == errno.ENOSPC:
            at = error.filename or constants.HF_HUB_CACHE
            found = f"{at} cannot be written: {error.strerror}", "make room there, or set HF_HOME to another folder"
        case ValueError():  # a name, or the head of a model card
            found = f"the hub does not take it: {' '.join(str(error).split())}", "mend that"
        case _ if is_unreachable(error) or isinstance(error, OSError):
            what = f"the hub does not answer at {constants.ENDPOINT}: {first_line(error)}"
            found = what, "check the network; files that came whole are kept"
    return found


def _answered(error: Any, repository: str, revision: str | None) -> tuple[str, str]:
    """The same of an answer other than yes."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        what = "its authors give it only to those who ask for it"
        return what, f"ask for it on {constants.ENDPOINT}/{repository}, then {_LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        what = "no such repository on the hub, or a private one"
        return what, f"check the name; for a private one {_LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no revision {revision} of it on the hub", "give a branch, a tag or a whole commit behind the @"
    status, said = error.response.status_code, error.server_message or error.response.reason_phrase
    match status:
        case 401:
            return "the hub does not take the token", f"make a new one in its settings, then {_LOG_IN}"
        case 403:
            return f"the hub does not allow it: {' '.join(said.split())}", f"take a token that may, {_LOG_IN}"
    return f"the hub answers {status}: {' '.join(said.split())}", "try again later"


def _unwrapped(error: BaseException) -> BaseException:
    """The first cause of what the client has wrapped once more."""
    from huggingface_hub import errors

    while isinstance(error, errors.LocalEntryNotFoundError | RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def client_errors() -> tuple[type[Exception], ...]:
    """What the client raises, its HTTP library's errors among it."""
    from huggingface_hub import errors

    return (_transport(), errors.XetDownloadError, OSError, RuntimeError, ValueError)


def is_unreachable(error: BaseException) -> bool:
    """True if no answer came, or none was asked for."""
    from huggingface_hub import errors

    answered = isinstance(error, errors.HfHubHTTPError)
    return not answered and isinstance(error, errors.OfflineModeIsEnabled | _transport())


def _transport() -> type[Exception]:
    """The base of the errors of the client's HTTP library, whichever version of it that is."""
    from huggingface_hub import errors

    found: type[Exception] = errors.HfHubHTTPError.__mro__[1]
    return found
