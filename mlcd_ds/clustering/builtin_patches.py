"""A feature extractor that needs no download: an unsupervised dictionary of patches (Coates and Ng 2011, ICML and AISTATS).

Random patches of the images are contrast-normalised, whitened (ZCA) and clustered on the sphere; an image is described by
how close each of its patches is to each dictionary entry ("triangle" activation), pooled over a grid, square-rooted,
reduced and (half) whitened by a PCA, and normalised. It serves toy data and CPU experiments; real runs use CLIP features.

Shapes: n images, H their side, p the side of a patch, P = 3pp values of a patch, K dictionary entries, q patches along a
side of the image, g cells along a side of the pooling grid, d features.
"""

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from mlcd_ds.config import FeaturesConfig
from mlcd_ds.errors import DataError
from mlcd_ds.files import write_bytes

CONTRAST_FLOOR = 10.0
"""Added to a patch's variance, of values 0..255, before it is divided by it: flat patches stay small."""
ZCA_FLOOR = 0.1
"""Added to the eigenvalues of the normalised patches' covariance before whitening."""
PCA_FLOOR = 1e-2
"""Added to the features' eigenvalues, as a share of the largest, before whitening."""
DICTIONARY_ITERATIONS = 15
STRIDE = 2
"""Pixels between patches."""
GRID = 1
"""g: pooling cells along a side. One: objects may be anywhere in a scene, and a cell of its own would say where."""
MAX_SIDE = 64
"""Larger images are scaled down to this side: patches of 6 pixels say nothing about a megapixel."""

IMAGES_AT_A_TIME = 4
"""Each has about a thousand patches, and each of these K distances: more images at a time leave the cache."""


@dataclass(frozen=True)
class PatchDictionary:
    """What is learnt: float32 arrays. Patches map to activations by `filters_PK` and `bias_K`, features by `pca_Fd`.

    image_size: side in pixels of the images it was learnt on and takes. learnt_with: see `learning_settings`.
    """

    image_size: int
    patch_size: int
    whitening_PP: np.ndarray
    mean_P: np.ndarray
    dictionary_KP: np.ndarray
    feature_mean_F: np.ndarray
    pca_Fd: np.ndarray
    learnt_with: dict

    @property
    def dim(self) -> int:
        """d."""
        return self.pca_Fd.shape[1]

    def save(self, path: Path) -> None:
        """Writes an .npz that `load` reads, under a temporary name first."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)} | {"learnt_with": json.dumps(self.learnt_with)}
        write_bytes(path, lambda file: np.savez(file, **arrays))

    @staticmethod
    def load(path: Path) -> "PatchDictionary":
        """Raises DataError when `path` is not such a file."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                values = {field.name: arrays[field.name] for field in fields(PatchDictionary)}
            values["image_size"], values["patch_size"] = int(values["image_size"]), int(values["patch_size"])
            values["learnt_with"] = json.loads(str(values["learnt_with"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path} is no patch dictionary of tools/extract_features.py, or is damaged: {error}. Give the patches.npz "
                "of a features folder, or remove the file to learn it again."
            ) from None
        return PatchDictionary(**values)

    def activations(self, images_n3HH: torch.Tensor) -> torch.Tensor:
        """uint8 images to pooled activations, float32 [n, F = K g g]."""
        patches_nPL = torch.nn.functional.unfold(images_n3HH.float(), self.patch_size, stride=STRIDE)
        patches_nLP = normalise_contrast(patches_nPL.transpose(1, 2))
        z_nLP = (patches_nLP - torch.from_numpy(self.mean_P)) @ torch.from_numpy(self.whitening_PP)
        dictionary_KP = torch.from_numpy(self.dictionary_KP)
        # |z - d|^2 = |z|^2 + 1 - 2 z.d, for unit entries d
        squared_nLK = torch.baddbmm(
            z_nLP.square().sum(2, keepdim=True) + 1, z_nLP, dictionary_KP.T.expand(len(z_nLP), -1, -1), alpha=-2
        )
        distance_nLK = squared_nLK.clamp_min_(0).sqrt_()
        mean_nL1 = distance_nLK.mean(2, keepdim=True)
        near_nLK = distance_nLK.neg_().add_(mean_nL1).clamp_min_(0)
        n, L, K = near_nLK.shape
        q = round(L**0.5)
        cells = torch.nn.functional.adaptive_avg_pool2d(near_nLK.transpose(1, 2).reshape(n, K, q, q), GRID)
        return cells.flatten(1).sqrt_()

    def all_activations(self, images_n3HH: torch.Tensor) -> torch.Tensor:
        """`activations` of many images.

        One thread per part instead of torch's threads inside each operation: these are small, and waiting for each other
        after every one of them made two threads on two busy cores 15 times slower than one. It also makes the features the
        same bytes for any number of threads.
        """

        def run(part: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():  # counts per thread, as the number of threads does
                return self.activations(part)

        with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return torch.cat(list(pool.map(run, images_n3HH.split(IMAGES_AT_A_TIME))))

    @torch.inference_mode()
    def embed(self, images_n3HH: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, H, H] to float32 [n, d] of unit length."""
        features_nF = self.all_activations(images_n3HH) - torch.from_numpy(self.feature_mean_F)
        return torch.nn.functional.normalize(features_nF @ torch.from_numpy(self.pca_Fd), dim=1)


def normalise_contrast(patches: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit contrast of each patch, along the last axis of values 0..255."""
    centered = patches - patches.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + CONTRAST_FLOOR).sqrt()


def learning_settings(config: FeaturesConfig) -> dict:
    """The settings that decide what is learnt."""
    learning = ("patch_size", "dictionary_size", "patch_features", "images_to_fit", "patches_to_fit", "seed")
    names = (*learning, "whitening_power")
    return {name: getattr(config, name) for name in names}


@torch.inference_mode()
def learn_dictionary(images_n3HH: np.ndarray, config: FeaturesConfig) -> PatchDictionary:
    """Learns from a sample of images, uint8 [n, 3, H, H]. Deterministic in (images, config.seed).

    Raises DataError when there are fewer images or patches than can be learnt from.
    """
    import faiss

    n, _, H, _ = images_n3HH.shape
    p, K = config.patch_size, config.dictionary_size
    if n < 2 or p > H:
        raise DataError(f"{n} images of {H} pixels are too few, or too small for patches of {p} pixels, to learn from")
    generator = np.random.default_rng(config.seed)
    count = max(config.patches_to_fit, 2 * K)
    which = generator.integers(0, n, count)
    top, left = generator.integers(0, H - p + 1, (2, count))
    windows = np.lib.stride_tricks.sliding_window_view(images_n3HH, (p, p), axis=(2, 3))
    patches = torch.from_numpy(windows[which, :, top, left].reshape(count, -1).astype(np.float32))
    patches = normalise_contrast(patches)
    mean_P = patches.mean(0)
    covariance = np.cov(patches.T.numpy().astype(np.float64))
    values, vectors = np.linalg.eigh(covariance)
    whitening_PP = ((vectors / np.sqrt(values.clip(0) + ZCA_FLOOR)) @ vectors.T).astype(np.float32)
    z = torch.nn.functional.normalize((patches - mean_P) @ torch.from_numpy(whitening_PP), dim=1)
    kmeans = faiss.Kmeans(
        z.shape[1],
        K,
        niter=DICTIONARY_ITERATIONS,
        spherical=True,
        seed=config.seed + 1,
        max_points_per_centroid=count,
        min_points_per_centroid=1,
    )
    kmeans.train(np.ascontiguousarray(z.numpy()))
    blank = np.zeros((1, 1), np.float32)
    first = PatchDictionary(H, p, whitening_PP, mean_P.numpy(), kmeans.centroids.copy(), blank, blank, {})
    features = first.all_activations(torch.from_numpy(np.ascontiguousarray(images_n3HH)))
    feature_mean_F, pca_Fd = _whitening_pca(features.numpy(), config.patch_features, config.whitening_power)
    return replace(first, feature_mean_F=feature_mean_F, pca_Fd=pca_Fd, learnt_with=learning_settings(config))


def _whitening_pca(features_nF: np.ndarray, dim: int, power: float) -> tuple[np.ndarray, np.ndarray]:
    """(mean [F], projection [F, d]), float32, to at most `dim` components, each over its eigenvalue to `power`."""
    mean_F = features_nF.mean(0, dtype=np.float64)
    covariance = np.cov((features_nF - mean_F).T.astype(np.float64))
    values, vectors = np.linalg.eigh(covariance)
    order = np.argsort(values)[::-1][: min(dim, len(values), len(features_nF) - 1)]
    values, vectors = values[order].clip(0), vectors[:, order]
    # The sign of an eigenvector is arbitrary: fix it, so that the same input gives the same features everywhere.
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(len(order))])
    projection = vectors / (values + PCA_FLOOR * values[0]) ** power
    return mean_F.astype(np.float32), projection.astype(np.float32)
