"""What becomes of a data set that two processes write at the same time."""

import pytest

from unclip_jax.data import preparation


class Overtaken:
    """A builder that finds its directory there when it is done, as TFDS does after another process was faster."""

    def __init__(self, path, *, whole: bool):
        self.data_path, self._whole = path, whole

    def is_prepared(self) -> bool:
        return False

    def download_and_prepare(self, *, file_format: str) -> None:
        self.data_path.mkdir()
        if self._whole:
            (self.data_path / "dataset_info.json").write_text("{}")
        raise FileExistsError(str(self.data_path))


def test_the_first_of_two_writers_wins_and_both_have_the_data(tmp_path):
    assert preparation.write_once(Overtaken(tmp_path / "set", whole=True)) == str(tmp_path / "set")


def test_a_directory_that_is_no_data_set_is_not_taken_for_one(tmp_path):
    with pytest.raises(FileExistsError):
        preparation.write_once(Overtaken(tmp_path / "set", whole=False))
