"""Writes a miniature of TFDS' `coco_captions` out of COCO's own files, with TFDS: a process of its own, for TensorFlow.

    python tests/coco_prepared.py captions_val2014.json val2014 OUT     prints the builder's directory
"""

import collections
import json
import pathlib
import sys

import numpy as np
import tensorflow_datasets as tfds


class CocoCaptions(tfds.core.GeneratorBasedBuilder):
    """The features of the real one, but for the boxes, and its splits."""

    VERSION = tfds.core.Version("1.1.0")
    source: tuple[str, str] = ("", "")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(encoding_format="jpeg"),
                "image/filename": tfds.features.Text(),
                "image/id": np.int64,
                "captions": tfds.features.Sequence({"id": np.int64, "text": np.str_}),
            }),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(place) for place, split in enumerate(("val", "test", "restval"))}

    def _generate_examples(self, place):
        annotations, folder = self.source
        whole = json.loads(pathlib.Path(annotations).read_text())
        captions = collections.defaultdict(list)
        for one in whole["annotations"]:
            captions[one["image_id"]].append({"id": one["id"], "text": one["caption"]})
        for image in whole["images"][place::3]:
            yield image["id"], {
                "image": (pathlib.Path(folder) / image["file_name"]).read_bytes(),
                "image/filename": image["file_name"],
                "image/id": image["id"],
                "captions": captions[image["id"]],
            }


if __name__ == "__main__":
    CocoCaptions.source = (sys.argv[1], sys.argv[2])
    builder = CocoCaptions(data_dir=sys.argv[3], file_format="array_record")
    builder.download_and_prepare()
    print(builder.data_dir)
