"""URLs of object stores, and what the environment says of the way there. Nothing here asks a store.

obstore takes an address that is none for a defect of the program, and ends in lines of Rust. So all that an address is
put together from is looked at before: the URL, and the variables that name a server, a region or a key.
"""

import re
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from cache_spec.errors import UserError

SETTINGS = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_", "file": ""}  # what the variables of each begin with
_SERVERS = {  # the variables that name one
    "s3": ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_METADATA_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
    "file": (),
}
_WORDS = {  # what else goes into a request, as letters of ASCII
    "s3": ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    "gs": (),
    "az": ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"),
    "file": (),
}
_BUCKET = re.compile(r"[A-Za-z0-9._$-]+")  # a dollar: Azure's $root and $web


def is_url(text: str) -> bool:
    """Whether a --cache or --out is the URL of a store rather than a folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def check_url(url: str) -> str:
    """The URL without a slash at its end. Raises UserError if it names no place in a store."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise UserError(f"{url!r:.200} is no URL; give s3://bucket/key") from None
    known = ", ".join(f"{scheme}://" for scheme in SETTINGS)
    if parts.scheme not in SETTINGS:
        raise UserError(f"{parts.scheme}:// is no store that granary knows; give a URL that begins with one of {known}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"a URL of a store is {parts.scheme}://bucket/key, with no '@', '?' or '#'; keys and tokens belong into "
            f"the environment ({SETTINGS[parts.scheme]}...)"
        )
    keys = parts.path.strip("/").split("/")
    is_folder = parts.scheme == "file"
    has_place = not parts.netloc if is_folder else _BUCKET.fullmatch(parts.netloc) is not None
    if not has_place or not unquote(url).isprintable() or any(key in ("", ".", "..") for key in keys):
        wanted = "file:///folder" if is_folder else f"{parts.scheme}://bucket/key"
        raise UserError(f"{url!r:.200} names no place in a store; give {wanted}")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def check_settings(url: str, environ: Mapping[str, str]) -> None:
    """Raises UserError if the environment holds what cannot be an address, a region or a key of the store at `url`."""
    scheme = url.partition(":")[0]
    for name in _SERVERS[scheme]:
        if name in environ and not _is_address(environ[name]):
            raise UserError(
                f"the environment's {name} is no address of a server; give http://host or https://host, with :port "
                "if it needs one, or unset it"
            )
    for name in _WORDS[scheme]:
        if re.search(r"[^!-~]", environ.get(name, "")):
            raise UserError(
                f"the environment's {name} holds a space, an end of a line or a letter that none has; mend it"
            )


def is_plain(url: str, environ: Mapping[str, str]) -> bool:
    """Whether the environment names a server without TLS for the store at `url`; whoever does, means it."""
    return any(environ.get(name, "").startswith("http://") for name in _SERVERS[url.partition(":")[0]])


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        port = parts.port  # ValueError, if it is none
    except ValueError:
        return False
    host = re.fullmatch(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+", parts.hostname or "")
    return parts.scheme in ("http", "https") and host is not None and port != 0 and re.search(r"[^!-~]", text) is None
