"""Upload to Neuronpedia's own interface: one call for each body, called again when the trouble may pass."""

import http.client
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from tenacity import RetryCallState, RetryError, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from cache_spec.errors import UserError
from cache_spec.files import canonical_json, write_file
from cache_spec.progress import Progress
from cache_spec.untrusted import MOST_BYTES, json_of, printable, read_bounded

KEY = "NEURONPEDIA_API_KEY"  # the environment variable; the key is never written anywhere
URL = "https://www.neuronpedia.org"
ROUTE = "api/feature/upload-batch"
DONE = "uploaded.json"  # in the folder: the bodies that were taken
_ATTEMPTS, _LONGEST_WAIT_S, _ANSWER_SECONDS = 6, 60.0, 120.0
_SOURCE = "the source set and the source have to be there first, made by the same account"
_MOST_TOLD = 300  # characters of what the server says


class Refused(UserError):
    """The server does not take the upload, or cannot be reached. What it took before stays taken."""

    exit_code = 1


class _Passing(Exception):
    """A failure that may pass: no connection, too many requests, a fault of the server."""


def read_key() -> str:
    """The key in the environment. Raises UserError if there is none."""
    key = os.environ.get(KEY, "").strip()
    if not key:
        raise UserError(f"--upload needs your Neuronpedia key in the environment variable {KEY}, and it is not set")
    return key


def upload(bodies: Sequence[Path], folder: Path, *, key: str, url: str = URL, wait_s: float = 1.0) -> int:
    """Send each body that was not taken before; returns how many were sent. Raises Refused with the server's reason."""
    _check_url(url)
    done = _done(folder, url)
    left = [body for body in bodies if body.name not in done]
    with Progress("upload", len(left), "calls") as progress:
        for body in left:
            try:
                Retrying(
                    retry=retry_if_exception(lambda error: isinstance(error, _Passing)),
                    wait=wait_exponential(multiplier=wait_s, max=_LONGEST_WAIT_S),
                    stop=stop_after_attempt(_ATTEMPTS),
                    before_sleep=_say,
                )(_post, f"{url.rstrip('/')}/{ROUTE}", body.read_bytes(), key)
            except RetryError as error:
                reason = error.last_attempt.exception()
                raise Refused(
                    f"{url} did not take {body.name} in {_ATTEMPTS} attempts ({reason}); {_SOURCE}; {len(done)} of "
                    f"{len(bodies)} are there, and the same command goes on with the others"
                ) from None
            done = [*done, body.name]
            write_file(folder / DONE, canonical_json({"url": url, "taken": done}) + b"\n")
            progress.advance()
    return len(left)


def _done(folder: Path, url: str) -> list[str]:
    try:
        facts = json_of(read_bounded(folder / DONE))
    except FileNotFoundError:
        return []
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or not isinstance(facts.get("taken"), list):
        raise UserError(
            f"{folder / DONE} is mangled, so what was uploaded is not known; write the export anew elsewhere"
        )
    return facts["taken"] if facts.get("url") == url else []


def _check_url(url: str) -> None:
    """The key goes over https alone, or to this machine."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1")):
        return
    raise UserError(f"--url {url} would send your key unprotected; give an address that begins with https://")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would repeat a redirected call as a GET, with the key, wherever it leads."""

    def redirect_request(self, req: object, fp: object, code: int, msg: str, headers: object, newurl: str) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def _post(address: str, body: bytes, key: str) -> None:
    request = urllib.request.Request(
        address, data=body, headers={"x-api-key": key, "content-type": "application/json"}, method="POST"
    )
    try:
        with _OPENER.open(request, timeout=_ANSWER_SECONDS) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        with error:  # its connection stays open otherwise
            said = _said(error)
        if error.code == 429 or error.code >= 500:
            raise _Passing(f"{error.code}: {said}") from None
        raise Refused(f"{address} refused the upload with {error.code}: {said}; {_advice(error.code)}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Passing(str(getattr(error, "reason", error)) or type(error).__name__) from None


def _said(error: urllib.error.HTTPError) -> str:
    """What the server says went wrong."""
    data = error.read(MOST_BYTES)
    text = data.decode(errors="replace")
    try:
        facts = json_of(data)
        text = str(facts.get("error") or facts.get("message") or text) if isinstance(facts, dict) else text
    except ValueError:
        pass
    return " ".join(text.split())[:_MOST_TOLD] or error.reason


def _advice(code: int) -> str:
    if code in (401, 403):
        return f"check the key in {KEY}"
    return _SOURCE


def _say(state: RetryCallState) -> None:
    assert state.outcome is not None
    then = f"goes on in {state.upcoming_sleep:.0f} s (attempt {state.attempt_number + 1} of {_ATTEMPTS})"
    print(printable(f"upload: {state.outcome.exception()}; {then}"), file=sys.stderr, flush=True)
