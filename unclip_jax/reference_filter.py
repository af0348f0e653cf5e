"""Makes the file of reference images that a filtered protocol leaves out: near-duplicates of a training set."""

import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from unclip_jax import digests, unclip
from unclip_jax.data.embeddings import Stored
from unclip_jax.errors import InputError
from unclip_jax.evaluation import near_duplicates, pools, protocols

_LOG = logging.getLogger(__name__)
_BLOCK = 8192


def run(config: ConfigDict, options: Any, stop: Callable[[], None]) -> str:
    """Compares a protocol's real images with a training set; returns a sentence.

    Args:
      config: of the evaluation; its first protocol that leaves near-duplicates out is meant.
      options: `clip`, `training`, `threshold` and `out`.
      stop: called between batches.

    Raises:
      InputError: the protocol leaves nothing out, or embeddings are of another CLIP.
    """
    named = [one for one in protocols.together(config.protocols) if one.without_near_duplicates]
    if not named:
        raise InputError(
            f"none of {', '.join(config.protocols)} leaves near-duplicates out; "
            "--config=configs/eval_coco.py:filtered does"
        )
    model = unclip.UnCLIP.load({"clip": options.clip}, microbatch=config.microbatch)
    clip = digests.fingerprint(model.part("clip").params)
    stored = [Stored(folder) for folder in options.training]
    for folder, one in zip(options.training, stored, strict=True):
        if one.job.clip != clip:
            raise InputError(
                f"the embeddings in {folder} are of the CLIP {one.job.clip}, and {options.clip} is {clip}; "
                "embed the training set by that one"
            )
    pool = pools.opened(named[0], {"data_dir": config.data_dir, **config.coco_files})
    z_i = []
    for start in range(0, len(pool.image_ids), config.unit_rows):
        stop()
        images = [pool.image(image_id) for image_id in pool.image_ids[start : start + config.unit_rows]]
        z_i.append(np.concatenate([model.embed_images(image[None]) for image in images]))
    cosines, neighbours = near_duplicates.nearest(np.concatenate(z_i), _blocks(stored, stop))
    removed = near_duplicates.write(
        pathlib.Path(options.out).expanduser(),
        protocol=named[0].name,
        threshold=options.threshold,
        clip=clip,
        training=[one.fingerprint for one in stored],
        image_ids=list(pool.image_ids),
        cosines=cosines,
        neighbours=neighbours,
    )
    share = 100 * len(removed.ids) / len(pool.image_ids)
    return (
        f"{len(removed.ids)} of {len(pool.image_ids)} images ({share:.1f}%) have a neighbour at {options.threshold:g} "
        f"or nearer; {options.out} names them, digest {removed.digest}"
    )


def _blocks(stored: list[Stored], stop: Callable[[], None]) -> Iterator[np.ndarray]:
    for one in stored:
        for start in range(0, len(one), _BLOCK):
            stop()
            index = np.arange(start, min(start + _BLOCK, len(one)))
            yield one.rows("z_i", index, np.zeros(len(index), bool))
