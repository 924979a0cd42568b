"""Damaged tars and label files by the thousand: every one must end in a counted skip or a clear error.

Not: a crash, a hang, a sample that vanishes from the counts, or labels other than those that were written. Pixels have no
checksum of ours: damage that a JPEG's or PNG's own decoder does not notice goes through, and is counted as "altered".
"""

import io
import signal
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from mlcd_ds.config import RunConfig, SoakMutationsConfig
from mlcd_ds.data.labels import LabelsInfo, read_label_shard, write_label_shard
from mlcd_ds.data.loader import ImageLabelLoader, build_shard_table
from mlcd_ds.data.plan import EpochPlan
from mlcd_ds.data.tars import write_tar
from mlcd_ds.errors import UserError
from mlcd_ds.files import write_json
from mlcd_ds.topology import Topology

IMAGES, LABELS, CLASSES, SIDE = 8, 3, 50, 16
SECONDS_ALLOWED = 20
KINDS = ("flips", "cut", "splice")


class Mutations:
    """A good tar with its label file in `folder`, and what became of damaged copies.

    outcomes: (file, kind, end) -> number.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        self.tar, self.label_file = folder / "tars" / "00000.tar", folder / "labels" / "00000.parquet"
        generator = np.random.default_rng(seed)
        self.keys = [f"{i:09d}" for i in range(IMAGES)]
        write_tar(self.tar, ((key, self._members(i, generator)) for i, key in enumerate(self.keys)))
        self.labels = np.stack([generator.permutation(CLASSES)[:LABELS] for _ in self.keys]).astype(np.int32)
        cosines = np.full((IMAGES, LABELS), 0.5, np.float16)
        info = LabelsInfo(CLASSES, LABELS, "c0ffee", "builtin:toy")
        write_label_shard(self.label_file, self.keys, self.labels, cosines, info)
        self.good = {"tar": self.tar.read_bytes(), "labels": self.label_file.read_bytes()}
        self.shard = read_label_shard(self.label_file)
        self.settings = RunConfig(
            deepspeed_config="-", shards="-", labels="-", output_dir="-", workers=0, num_positives=LABELS, flip=False
        )
        _, self.images = self._read()
        self.outcomes: Counter = Counter()

    def _members(self, i: int, generator: np.random.Generator) -> dict[str, bytes]:
        pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((24 + i, 20), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        kind = ("JPEG", "PNG", "WEBP")[i % 3]
        image.save(buffer, kind)
        return {{"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]: buffer.getvalue(), "json": b'{"a": 1}'}

    def run(self, number: int) -> None:
        """The `number`-th damaged copy: a function of (seed, number). Raises AssertionError for anything but a good end."""
        generator = np.random.default_rng([self.seed, number])
        file, kind = ("tar", "labels")[number % 2], KINDS[number // 2 % len(KINDS)]
        path = self.tar if file == "tar" else self.label_file
        good = self.good[file]
        damaged = mutated(good, kind, generator)
        path.write_bytes(damaged)
        signal.alarm(SECONDS_ALLOWED)  # the default action ends the process: a hang cannot pass for anything else
        try:
            end = self._check_tar() if file == "tar" else self._check_labels()
        except UserError as error:
            assert "00000" in str(error), f"mutation {number}: no file named in {error}"
            end = "refused"
        except AssertionError as error:
            raise AssertionError(f"mutation {number} ({file}, {kind}, seed {self.seed}): {error}") from None
        finally:
            signal.alarm(0)
            path.write_bytes(good)
        self.outcomes[file, kind, "as it was" if damaged == good else end] += 1

    def _check_labels(self) -> str:
        found = read_label_shard(self.label_file)
        same = found.keys == self.shard.keys and found.info == self.shard.info
        same = same and np.array_equal(found.labels, self.shard.labels)
        assert same and np.array_equal(found.cosines, self.shard.cosines), "labels changed silently"
        return "read as written"

    def _check_tar(self) -> str:
        ledger, images = self._read()
        if ledger.num_skipped:
            return "counted skip"
        if images.keys() != self.images.keys():
            return "whole images lost, said at the start"
        same = all(np.array_equal(images[key], self.images[key]) for key in images)
        return "read as written" if same else "altered"

    def _read(self) -> tuple:
        """(ledger, {key: pixels}) of one epoch; asserts that the counts and the labels are right."""
        one = Topology.single()
        table = build_shard_table([str(self.tar)], [self.label_file.parent], LABELS, 1.0, None, one)
        plan = EpochPlan(0, table.counts, table.num_samples, 4)
        loader = ImageLabelLoader(self.settings, table, plan, SIDE, one)
        (batch,) = loader.iterate(0, 1)
        ledger = loader.ledger
        assert table.num_samples + table.surplus_labels == IMAGES + table.without_label, "lost images are not told"
        assert ledger.read == table.num_samples == ledger.decoded_of[0] + ledger.skipped_of[0], (
            "the counts do not add up"
        )
        images = {}
        for key, row, pixels in zip(batch.keys, batch.labels_BL.tolist(), batch.images_BCHH.numpy(), strict=True):
            if key:
                assert key in self.keys, f"a sample of another name: {key!r}"
                assert row == self.labels[self.keys.index(key)].tolist(), f"wrong labels for {key}"
                images[key] = pixels.copy()
        return ledger, images


def mutated(data: bytes, kind: str, generator: np.random.Generator) -> bytes:
    """A damaged copy. "flips": 1 to 8 bits; "cut": its end lost; "splice": a piece lost, doubled, zeroed, or copied over."""
    damaged = bytearray(data)
    at = int(generator.integers(len(data)))
    if kind == "flips":
        for place in generator.integers(8 * len(data), size=generator.integers(1, 9)):
            damaged[place // 8] ^= 1 << int(place % 8)
    elif kind == "cut":
        del damaged[at:]
    else:
        # Half of the splices in whole blocks: only they leave a tar's headers where a reader looks for them.
        unit = 512 if generator.random() < 0.5 else 1
        length = unit * int(generator.integers(1, max(2, len(data) // (4 * unit))))
        at, source = at // unit * unit, int(generator.integers(len(data))) // unit * unit
        piece = bytes(damaged[source : source + length])
        how = generator.integers(4)
        if how == 0:
            del damaged[at : at + length]
        elif how == 1:
            damaged[at:at] = piece
        elif how == 2:
            damaged[at : at + length] = bytes(len(damaged[at : at + length]))
        else:
            damaged[at : at + len(piece)] = piece
    return bytes(damaged)


def soak_mutations(config: SoakMutationsConfig) -> dict[str, int]:
    """Reads `config.count` damaged tars and label files; prints and returns how many ended how, else AssertionError."""
    from tqdm import tqdm

    with tempfile.TemporaryDirectory() as folder:
        mutations = Mutations(Path(folder), config.seed)
        for number in tqdm(range(config.count), desc="mutations", unit="file", mininterval=1):
            mutations.run(number)
    ends = {", ".join(names): count for names, count in sorted(mutations.outcomes.items())}
    for names, count in ends.items():
        print(f"{count:7,}  {names}")
    print(f"{config.count} mutations, seed {config.seed}: no crash, no hang, no wrong label")
    if config.output is not None:
        write_json(Path(config.output), {"count": config.count, "seed": config.seed, "ends": ends})
    return ends
