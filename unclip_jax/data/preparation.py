"""Writes a TFDS builder's splits as ArrayRecord, once and whole.

Every data set of the project keeps one contract: a directory of a prepared builder, whose records have at least
`image` (PNG, JPEG or WebP bytes where decoding is skipped), `caption` and `id`, which tells a record from the others
(the built-in sets count from 0 in each split; a user's own pictures leave gaps). A built-in set's `prepare` writes it
and returns the directory. Reading it back needs no TensorFlow:

    builder = tfds.builder_from_directory(directory)
    source = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
"""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from etils import epath

if TYPE_CHECKING:
    import tensorflow_datasets as tfds


def write_once(builder: "tfds.core.DatasetBuilder") -> str:
    """Writes all splits of a builder, unless they are there, and returns their directory.

    TFDS writes into a directory of another name and renames it last: where the returned directory exists, it is
    whole. Of several processes that write at the same time the first one wins. An interrupted preparation leaves at
    most `incomplete.<...>_<version>`, which the next one does not read. Only writing imports TensorFlow.
    """
    with quiet():
        if builder.is_prepared():
            return str(builder.data_path)
        _import_tensorflow()
        import tensorflow_datasets as tfds

        if not sys.stderr.isatty():
            tfds.disable_progress_bar()
        # TFDS prints that it downloads, which it does not.
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                builder.download_and_prepare(file_format="array_record")
            except FileExistsError:  # another process was as far in the meantime; what is there is whole
                if not (epath.Path(builder.data_path) / "dataset_info.json").exists():
                    raise
    return str(builder.data_path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what TFDS logs as warnings where all is well: that nothing is prepared yet, that a config is custom."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _import_tensorflow() -> None:
    """Imports TensorFlow quietly, and keeps it off GPUs, whose memory it would take whole: it only packs bytes."""
    if "tensorflow" in sys.modules:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
