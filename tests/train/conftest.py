"""A small base model and rows to train on."""

import pytest
from runs import write_base, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def folder(tmp_path):
    write_rows(tmp_path / "train.jsonl")
    return tmp_path
