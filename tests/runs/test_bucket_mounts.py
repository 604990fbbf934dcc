"""Buckets that are mounted as folders are recognised by the table of mounts."""

from pathlib import Path

import pytest

from phi3_jax.runs import bucket_mounts
from phi3_jax.runs.bucket_mounts import bucket_mount, check_no_bucket_mount

TABLE = r"""/dev/sda1 / ext4 rw 0 0
my-bucket /mnt/a\040bucket fuse.gcsfuse rw,user_id=0 0 0
/dev/sdb1 /mnt/a\040bucket/disk ext4 rw 0 0
mountpoint-s3 /mnt/s3 fuse rw 0 0
remote: /mnt/drive fuse.rclone rw 0 0
host:/home /mnt/home fuse.sshfs rw 0 0
old /mnt/twice fuse.s3fs rw 0 0
/dev/sdc1 /mnt/twice ext4 rw 0 0
"""


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    table = tmp_path / "mounts"
    table.write_text(TABLE)
    monkeypatch.setattr(bucket_mounts, "MOUNTS", table)
    return table


@pytest.mark.parametrize(
    ("path", "program"),
    [
        ("/mnt/a bucket", "gcsfuse"),
        ("/mnt/a bucket/runs/answers.jsonl", "gcsfuse"),
        ("/mnt/a bucket/disk/answers.jsonl", None),
        ("/mnt/a bucket too", None),
        ("/mnt/s3/answers.jsonl", "mountpoint-s3"),
        ("/mnt/drive/answers.jsonl", "rclone"),
        ("/mnt/home/answers.jsonl", None),
        ("/mnt/twice/answers.jsonl", None),
        ("/home/answers.jsonl", None),
    ],
)
def test_finds_the_program_that_mounts_a_bucket(path: str, program: str | None) -> None:
    mount = bucket_mount(Path(path))
    assert (None if mount is None else mount.program) == program


def test_rejects_paths_in_a_bucket(tmp_path: Path) -> None:
    expected = (
        r"^/mnt/a bucket/out is in a bucket that gcsfuse mounts at /mnt/a bucket, .* URL, as in gs://BUCKET/"
    )
    with pytest.raises(ValueError, match=expected):
        check_no_bucket_mount(Path("/mnt/a bucket/out"))
    link = tmp_path / "link"
    link.symlink_to("/mnt/a bucket")
    with pytest.raises(ValueError, match="is in a bucket"):
        check_no_bucket_mount(link / "out")
    check_no_bucket_mount(tmp_path)


def test_other_systems_have_no_table(table: Path) -> None:
    table.unlink()
    check_no_bucket_mount(Path("/mnt/a bucket"))
