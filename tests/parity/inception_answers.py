"""Computes the features that `inception.check_device` and tests know, by torch-fidelity's network in float64.

    PYTHONPATH=.:tests python -m parity.inception_answers

rewrites `unclip_jax/evaluation/inception_answers.npz` and `tests/parity/inception_folder.npz`: features of a folder of
PNG files as torch-fidelity reads it, and the distance of two files of moments as pytorch-fid reads them. It needs torch
2.13.0, torch-fidelity 0.4.0, pytorch-fid 0.3.0 and torchvision 0.28.0; tests need none but torch, and few of them that.
"""

import pathlib
import tempfile
from typing import Any

import numpy as np
import torch
from parity import inception_folder

from unclip_jax.evaluation import inception

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = (299, 256, 64)


def extractor(folder: pathlib.Path):
    """torch-fidelity's network with redrawn weights, in float64; its option of that name does nothing in 0.4.0."""
    # Packages of torchvision for CUDA ask torch for two operators that only they would register.
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torch_fidelity import feature_extractor_inceptionv3 as module

    # The graph finds places between pixels in float32, which float64 would not repeat.
    resize = module.interpolate_bilinear_2d_like_tensorflow1x
    module.interpolate_bilinear_2d_like_tensorflow1x = lambda x, **options: resize(x.float(), **options).double()
    path = folder / "redrawn.pth"
    tensors = inception.redrawn_tensors(inception.ANSWERS_SEED)
    counters = {name.replace("running_mean", "num_batches_tracked"): 0 for name in tensors if "running_mean" in name}
    named = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    torch.save(named | {name: torch.tensor(count) for name, count in counters.items()}, path)
    names = ["64", "192", "768", "2048", "logits_unbiased"]
    network = module.FeatureExtractorInceptionV3("redrawn", names, feature_extractor_weights_path=str(path))
    network.feature_extractor_internal_dtype = torch.float64
    return network.double(), names


def answers(network, names, images: np.ndarray) -> dict[str, np.ndarray]:
    """Six features of uint8 [b, h, w, 3], rounded to float32."""
    spatial = []
    handle = network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: spatial.append(output))
    found = dict(zip(names, network(torch.from_numpy(images).permute(0, 3, 1, 2)), strict=True))
    handle.remove()
    # ADM's evaluation flattens the TensorFlow graph's layout: rows, columns, channels.
    found["spatial"] = spatial[0][:, :7].permute(0, 2, 3, 1).flatten(1)
    return {name: value.numpy().astype(np.float32) for name, value in found.items()}


def of_folder(network, names, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Features of the folder that the test writes, through torch-fidelity's own reading of it."""
    from torch_fidelity.datasets import ImagesPathDataset, TransformPILtoRGBTensor

    inception_folder.write(folder)
    paths = [str(folder / f"{name}.png") for name in inception_folder.NAMES]
    data = ImagesPathDataset(paths, transforms=TransformPILtoRGBTensor())
    images = torch.stack([data[number] for number in range(len(data))])
    return answers(network, names, images.permute(0, 2, 3, 1).numpy())


def of_files(folder: pathlib.Path) -> np.ndarray:
    """pytorch-fid's distance of two files that the test writes."""
    from pytorch_fid import fid_score

    paths = inception_folder.write_moments(folder)
    read = [fid_score.compute_statistics_of_path(str(path), None, 1, 2048, "cpu") for path in paths]
    return np.asarray(fid_score.calculate_frechet_distance(*read[0], *read[1]))


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        network, names = extractor(folder)
        kept: dict[str, Any] = of_folder(network, names, folder / "images")
        kept["fid"] = of_files(folder)
    np.savez(ROOT / "tests" / "parity" / inception_folder.ANSWERS, **kept)
    arrays: dict[str, Any] = {}
    for size in SIZES:
        for name, value in answers(network, names, inception.known_images(size)).items():
            arrays[f"{size}/{name}"] = value
    np.savez(ROOT / "unclip_jax" / "evaluation" / inception.ANSWERS, **arrays)


if __name__ == "__main__":
    main()
