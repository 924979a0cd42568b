"""Image-text retrieval: whether an image's own captions are among the k nearest texts, and a caption's image among the k
nearest images (recall at k; CLIP_benchmark's names, in which `image_retrieval` looks for images, by texts).

An image may have several captions; one of them found is enough. Equal scores stand in the order of the set, so a caption
that several images share finds one of them only. No [N, M] matrix exists: scores are made a block of rows at a time.

Shapes: N images, M texts, D width of the joint embedding, r rows of a block.
"""

import json
import time
from collections import Counter

import numpy as np
import torch

from mlcd_ds import collectives
from mlcd_ds.config import RetrievalConfig
from mlcd_ds.data.captions import EXTENSIONS, FIELD, TEXT, caption_extension
from mlcd_ds.errors import ConfigError
from mlcd_ds.evaluation.features import check_usable
from mlcd_ds.evaluation.results import Result
from mlcd_ds.evaluation.towers import TestSet, Towers, embed_distinct, embedded_batches, own_share
from mlcd_ds.topology import Topology

TASK = "zeroshot_retrieval"
PROTOCOL = "cosine, central crops, every caption of an image counts as its own, equal scores in the order of the set"


def retrieval_set(config: RetrievalConfig, tested: TestSet, towers: Towers, topology: Topology) -> Result:
    """Evaluates one set; every rank takes a share of its tars. Raises DataError for images that cannot be used."""
    started = time.monotonic()
    counts = recall_counts(config)
    numbered = {shard: number for number, shard in enumerate(tested.shards)}

    def own_part() -> tuple[list[tuple], Counter]:
        skipped, own = Counter(), []
        for shard in own_share(tested.shards, topology):
            features, captions = [], []
            for batch in embedded_batches(config, towers, [shard], EXTENSIONS, skipped, topology.is_main):
                texts = [captions_of_image(members) for members in batch.parts]
                has = [bool(found) for found in texts]
                skipped.update({"no_caption": has.count(False)} if not all(has) else {})
                features.append(batch.features[torch.tensor(has)].numpy())
                captions += [found for found in texts if found]
            own.append((numbered[shard], features, captions))
        return own, skipped

    parts = collectives.all_for_long(topology, own_part)
    total = sum((counter for _, counter in parts), Counter())
    # In the order of the set, whoever has read which tar.
    ordered = sorted((entry for some, _ in parts for entry in some), key=lambda entry: entry[0])
    captions = [found for *_, some in ordered for found in some]
    check_usable(config, config.split, len(captions), total)
    images_ND = torch.from_numpy(np.concatenate([part for _, features, _ in ordered for part in features]))
    texts = [text for found in captions for text in found]
    owner_M = torch.tensor([image for image, found in enumerate(captions) for _ in found])
    texts_MD = _embed_shared(towers, texts, config.batch_size, topology)
    device = topology.device
    ranks = own_ranks(images_ND.to(device), texts_MD.to(device), owner_M.to(device), config.block_rows, topology)
    metrics = {}
    for name, rank in (("image_retrieval_recall", ranks[1]), ("text_retrieval_recall", ranks[0])):
        metrics |= {f"{name}@{k}": float((rank < k).double().mean()) for k in counts}
    return Result(
        tested.name,
        towers.name,
        config.model,
        TASK,
        metrics,
        config.language,
        {
            "main_metric": f"image_retrieval_recall@{counts[0]}",
            "protocol": PROTOCOL,
            "split": config.split,
            "n_images": len(captions),
            "n_texts": len(texts),
            "distinct_texts": len(set(texts)),
            "skipped": dict(total),
            "seconds": round(time.monotonic() - started, 2),
        },
    )


def recall_counts(config: RetrievalConfig) -> list[int]:
    """The numbers in --recall_k, rising. Raises ConfigError for anything else."""
    try:
        counts = sorted({int(part) for part in config.recall_k.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise ConfigError(
            f"--recall_k {config.recall_k!r}: expected whole numbers above 0, joined by commas, like 1,5,10"
        )
    return counts


def captions_of_image(members: dict[str, bytes]) -> list[str]:
    """Each line of KEY.txt; where that is missing, the caption in KEY.json, or each of a list of them."""
    extension = caption_extension(members)
    if extension is None:
        return []
    try:
        text = members[extension].decode("utf-8")
        if extension == TEXT:
            return [line.strip() for line in text.splitlines() if line.strip()]
        found = json.loads(text).get(FIELD)
    except (ValueError, AttributeError):
        return []
    found = found if isinstance(found, list) else [found]
    return [text.strip() for text in found if isinstance(text, str) and text.strip()]


def _embed_shared(towers: Towers, texts: list[str], batch_size: int, topology: Topology) -> torch.Tensor:
    """float32 [M, D]; each rank embeds a share of the distinct texts."""
    own = own_share(list(dict.fromkeys(texts)), topology)

    def own_part() -> tuple[list[str], np.ndarray | None]:
        return own, embed_distinct(towers, own, batch_size, "texts", topology.is_main).numpy() if own else None

    vectors: dict[str, np.ndarray] = {}
    for some, part in collectives.all_for_long(topology, own_part):
        vectors |= dict(zip(some, part, strict=True)) if some else {}
    return torch.from_numpy(np.stack([vectors[text] for text in texts]))


def own_ranks(
    images_ND: torch.Tensor, texts_MD: torch.Tensor, owner_M: torch.Tensor, block_rows: int, topology: Topology
) -> tuple[torch.Tensor, torch.Tensor]:
    """(for each image, how many texts stand before the first of its own [N]; for each text, how many images before its own
    [M]). int64, on the CPU; each rank makes a share of the blocks.

    owner_M: int64, the image of each text; every image has one. Texts and images of equal score stand in their order.
    """
    N, M = len(images_ND), len(texts_MD)

    def of_images(a: int, z: int) -> torch.Tensor:
        scores_rM = images_ND[a:z] @ texts_MD.T
        own_rM = owner_M == torch.arange(a, z, device=owner_M.device)[:, None]
        best_r1 = scores_rM.masked_fill(~own_rM, -torch.inf).amax(dim=1, keepdim=True)
        place_r1 = ((scores_rM == best_r1) & own_rM).int().argmax(dim=1, keepdim=True)
        return _before(scores_rM, best_r1, place_r1)

    def of_texts(a: int, z: int) -> torch.Tensor:
        scores_rN = texts_MD[a:z] @ images_ND.T
        place_r1 = owner_M[a:z, None]
        return _before(scores_rN, scores_rN.gather(1, place_r1), place_r1)

    blocks = [
        (side, a, min(a + block_rows, count)) for side, count in enumerate((N, M)) for a in range(0, count, block_rows)
    ]
    made = [((of_images, of_texts)[side](a, z).cpu().numpy(), side, a) for side, a, z in own_share(blocks, topology)]
    ranks = torch.zeros(N, dtype=torch.int64), torch.zeros(M, dtype=torch.int64)
    for part in collectives.gather_objects(made, topology):
        for values, side, a in part:
            ranks[side][a : a + len(values)] = torch.from_numpy(values)
    return ranks


def _before(scores_rn: torch.Tensor, own_r1: torch.Tensor, place_r1: torch.Tensor) -> torch.Tensor:
    """[r]: columns of a higher score than the own one, and of the same score that stand before it."""
    earlier_rn = torch.arange(scores_rn.shape[1], device=scores_rn.device) < place_r1
    return ((scores_rn > own_r1) | ((scores_rn == own_r1) & earlier_rn)).sum(dim=1)
