"""Buckets that are mounted as folders, which do not keep what files of a disk keep."""

import re
from pathlib import Path
from typing import NamedTuple

from phi3_jax.errors import UserError

MOUNTS = Path("/proc/self/mounts")
"""Linux's table of mounted file systems; other systems have none."""

_PROGRAMS = {
    "gcsfuse": "gs",
    "rclone": "gs",
    "s3fs": "s3",
    "goofys": "s3",
    "geesefs": "s3",
    "mountpoint-s3": "s3",
    "blobfuse": "az",
    "blobfuse2": "az",
}
"""Programs that mount buckets, and the protocol of the URLs to write to in their place."""


class BucketMount(NamedTuple):
    """A folder that is a bucket."""

    folder: Path
    program: str
    """The program that mounted it."""


def bucket_mount(path: Path) -> BucketMount | None:
    """Returns the mounted bucket that a path is in; None if it is on another file system."""
    try:
        table = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    resolved = path.resolve()
    device, kind, folder = "", "", None
    for line in table.splitlines():
        source, mounted_on, system, *_ = map(_unescape, line.split(" "))
        mounted = Path(mounted_on)
        # The last mount on a folder hides those before.
        if resolved.is_relative_to(mounted) and (folder is None or mounted.is_relative_to(folder)):
            device, kind, folder = source, system, mounted
    # Some programs name themselves as the kind, as in fuse.gcsfuse, and some as the device of kind fuse.
    program = kind.removeprefix("fuse.") if kind != "fuse" else device
    return BucketMount(folder, program) if folder is not None and program in _PROGRAMS else None


def check_no_bucket_mount(path: Path) -> None:
    """Checks that a path is not in a bucket that is mounted as a folder.

    Such a folder has no locks, what is written reaches the bucket only when the file is closed, a line that
    is appended writes the whole file again, and a folder is renamed file by file. A kill then loses data.

    Raises:
        UserError: it is in one.
    """
    if (mount := bucket_mount(path)) is not None:
        raise UserError(
            f"{path} is in a bucket that {mount.program} mounts at {mount.folder}, where a kill can lose "
            f"data; give its URL, as in {_PROGRAMS[mount.program]}://BUCKET/PATH, or a local path"
        )


def _unescape(text: str) -> str:
    r"""Returns a field of the table with its characters for \040 and so on."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
