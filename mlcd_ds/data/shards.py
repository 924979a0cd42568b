"""Tars joined with their labels, or with the captions in them: what every rank must know before the first step, and what
reads one sample.

Shapes: n images of a shard, H folders of labels (one per head), l labels used per image and folder.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from mlcd_ds.batch import NO_LABEL
from mlcd_ds.collectives import gather_objects
from mlcd_ds.data.captions import EXTENSIONS, CaptionError, caption_extension, read_caption
from mlcd_ds.data.decode import ImageError
from mlcd_ds.data.labels import (
    LabelShard,
    LabelsInfo,
    check_enough_labels,
    check_same_labels,
    label_path,
    missing_labels,
    read_label_shard,
)
from mlcd_ds.data.storage import RETRY_SECONDS, UnreadableError
from mlcd_ds.data.tar_index import FoundIndex, examine
from mlcd_ds.data.tars import (
    ChangedTarError,
    MissingTarError,
    OpenTar,
    TarIndex,
    TarState,
    is_url,
    local_shard,
    shard_name,
    stated_samples,
)
from mlcd_ds.errors import DataError
from mlcd_ds.topology import Topology

KEPT_SAMPLES = 2_000_000
"""Samples whose places and labels stay in memory after the check at the start (about 60 bytes each)."""

MAX_OPEN_FILES = 64
"""Tars that one process keeps open: far below the usual limit of 1024 files."""

TAR_PROBLEMS = ("damaged_tar", "missing_tar")
"""Why all images of a tar, or those from its damage on, cannot be used."""


@dataclass(frozen=True)
class ShardContents:
    """A tar's images in tar order, joined with their labels by key; compact, for millions live in memory.

    keys: bytes [n]. offsets, sizes: int64 [n], of the image in the tar. labels: int32 [n, H*l], folder h's in the columns
    from h*l on, nearest first, NO_LABEL as padding. labelled: bool [n], whether the image is in every folder, or, of a run
    on captions, has a member to hold one. captions: int64 [n, 3], of a run on captions: byte offset and size of that member,
    and which of captions.EXTENSIONS it is (-1: none). problem, damage: of a tar that is damaged or missing, one of
    TAR_PROBLEMS and what is wrong with it; the images it has lost keep their place, with LOST as their offset, so that the
    order of all others stays. shard: its number in the table. state: as which the tar was examined on this host.
    """

    path: Path
    keys: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    labelled: np.ndarray
    captions: np.ndarray | None = None
    problem: str = ""
    damage: str = ""
    shard: int = -1
    state: TarState | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, index: int) -> str:
        """Key of one image."""
        return self.keys[index].decode()


@dataclass(frozen=True)
class ShardTable:
    """All shards of a run, the same on every rank.

    shards: paths or URLs, and names: what their labels are found by. counts: images of each. labels_dirs: the H
    folders of labels, and labels_infos: what the labels of each are of. without_label: images without a label in some
    folder (they are skipped, and counted, in every epoch). without_positive: images whose list is empty in a label
    file: they are used. duplicates, ignored, without_image: members and samples of the tars that are not used (see
    `TarIndex`). unfit_indexes: side-car indexes that are stale or damaged (their tars were walked, and the index
    could not be written anew). surplus_labels: rows of label files whose image is not in the tar (one that lost whole
    members looks like that). lacking_images, lacking_tar: samples that tars have fewer than img2dataset's _stats.json
    beside them says, and one of those tars. captions: images are paired with their captions, not with labels;
    without_label then counts those without one. key_sets, key_orders: of each tar, 64 bits of a digest of its images'
    keys, whatever their order, and in their order (None: a damaged tar, of whose order nothing tells). quarantined:
    the number of a tar that is damaged or missing, how many images it has lost, and what is wrong with it; those
    images are counted in `counts`, and skipped in every epoch.
    """

    shards: tuple[str, ...]
    names: tuple[str, ...]
    counts: tuple[int, ...]
    labels_dirs: tuple[Path, ...]
    num_positives: int
    cache_dir: str | None
    labels_infos: tuple[LabelsInfo, ...]
    without_label: int = 0
    without_positive: int = 0
    duplicates: int = 0
    ignored: int = 0
    without_image: int = 0
    unfit_indexes: int = 0
    surplus_labels: int = 0
    lacking_images: int = 0
    lacking_tar: str = ""
    captions: bool = False
    quarantined: tuple[tuple[int, int, str], ...] = ()
    index_folder: Path | None = None
    allow_pipe: bool = False
    key_sets: tuple[int, ...] = ()
    key_orders: tuple[int | None, ...] = ()
    kept: dict[int, ShardContents] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_samples(self) -> int:
        """Images of one epoch."""
        return sum(self.counts)

    def unused(self) -> tuple[str, ...]:
        """Sentences for people: what of the tars takes no part in the run, and how many of it; empty where all does."""
        what = "caption" if self.captions else "label"
        sentences = (
            (self.without_label, f"images have no {what}: they are skipped, and counted, in every epoch"),
            (
                self.without_positive,
                "images have an empty list of labels (no center above the threshold, or dropped features): they are used, "
                "against negatives alone",
            ),
            (self.duplicates, "members repeat a name of their tar: the first one counts"),
            (self.without_image, "samples have no image"),
            (self.ignored, "members are not part of a sample (no extension, or not a file)"),
            (self.surplus_labels, "labels are of images that the tars lack: did tars lose images after labelling?"),
            (
                self.unfit_indexes,
                "indexes are stale or damaged, their tars were walked: run tools/index_shards.py again",
            ),
        )
        found = tuple(f"{count:,} {text}" for count, text in sentences if count)
        if self.lacking_images:
            found += (
                f"{self.lacking_images:,} samples fewer than the _stats.json beside the tars say: did tars lose some? E.g. "
                f"{self.lacking_tar}",
            )
        if self.quarantined:
            lost = sum(count for _, count, _ in self.quarantined)
            found += (
                f"{lost:,} images are lost in {len(self.quarantined):,} damaged or missing tars: they are skipped, and "
                f"counted, in every epoch. E.g. {self.quarantined[0][2]}",
            )
        return found

    def fingerprint(self) -> str:
        """Two parts for a checkpoint to compare, "-" between: one changes with names, counts or labels, one with the keys.

        Checkpoints of earlier versions have the first alone.
        """
        infos = self.labels_infos if len(self.labels_infos) > 1 else next(iter(self.labels_infos), "captions")
        text = repr((self.names, self.counts, infos, self.num_positives))
        return f"{_short_digest(text)}-{_short_digest(repr(self.key_sets))}"

    def order(self, plan: str) -> str:
        """The order of an epoch's samples, for a checkpoint to compare: the fingerprint of its plan, "-", and what changes
        with the order of the keys within tars. The first part alone where tars are damaged and nothing tells.
        """
        return plan if None in self.key_orders else f"{plan}-{_short_digest(repr(self.key_orders))}"

    def load(self, shard: int) -> ShardContents:
        """Reads a tar's index or headers and its labels again.

        Of a tar that is damaged or missing now, what is left of it; every image keeps its place. Raises DataError when tar
        or labels are others than at the start.
        """
        return self.kept[shard] if shard in self.kept else self._load(shard)

    def load_again(self, before: ShardContents) -> ShardContents:
        """What is left of a tar that was written to after `before` was loaded; every image keeps its place. Of one that is
        damaged now, what lies where it lay.

        Raises ChangedTarError where the tar is whole: nothing tells whether its images are still those of the labels. One
        that was fetched once more may be, if everything lies where it lay.
        """
        shard = before.shard
        now = self._load(shard, tuple(key.decode() for key in before.keys))
        left = now.offsets != LOST
        in_place = np.array_equal(now.keys, before.keys) and all(
            np.array_equal(getattr(now, name)[left], getattr(before, name)[left]) for name in ("offsets", "sizes")
        )
        if not now.damage and not (in_place and is_url(self.shards[shard])):
            raise ChangedTarError(
                f"the tar {before.path} became another while the run was reading it: it had {before.state}, now "
                f"{now.state}. Start again with --resume auto."
            )
        if not in_place:
            now = _all_lost(now, len(before))
        if shard in self.kept:
            self.kept[shard] = now
        return now

    def _load(self, shard: int, keys_before: tuple[str, ...] = ()) -> ShardContents:
        path = self.shards[shard]
        labels = [read_label_shard(label_path(folder, self.names[shard])) for folder in self.labels_dirs]
        found = look_into(path, self.cache_dir, self.allow_pipe, self.index_folder)
        if keys_before:
            found = replace(found, keys_before=keys_before)
        contents = _join(found, labels, self.num_positives, self.captions, shard)
        infos = tuple(found.info for found in labels)
        if infos == self.labels_infos and contents.damage and len(contents) != self.counts[shard]:
            contents = _all_lost(contents, self.counts[shard])
        if len(contents) != self.counts[shard] or infos != self.labels_infos:
            raise DataError(
                f"{path} or its labels changed while the run was reading them: {self.counts[shard]} images of "
                f"{_listed(self.labels_infos)} at the start, now {len(contents)} of {_listed(infos)}. Start again with "
                "--resume auto."
            )
        keys = found.index.keys
        if not contents.damage and (
            _digest(sorted(keys)) != self.key_sets[shard] or self.key_orders[shard] not in (None, _digest(keys))
        ):
            raise DataError(
                f"{path} changed while the run was reading it: it has as many images as at the start, but other keys or the "
                "same in another order. Start again with --resume auto."
            )
        return contents


def look_into(path: str, cache_dir: str | None, allow_pipe: bool, index_folder: Path | None) -> FoundIndex:
    """`examine`, of a tar that may be remote; one that cannot be fetched is missing. Raises nothing for a bad tar.

    Raises UnreadableError where the machine is to blame.
    """
    try:
        local = local_shard(path, cache_dir, allow_pipe)
    except UnreadableError:
        raise
    except DataError as error:
        nothing = TarIndex(Path(path), (), {})
        return FoundIndex(nothing, "absent", damage=MissingTarError(str(error)))
    found = examine(local, index_folder)
    if found.damage is None and not found.index.keys:
        names = [f"{key}.*" for key in found.index.without_image[:3]] or ["nothing"]
        text = (
            f"the tar {path} holds no image: found {', '.join(names)}, wanted KEY.jpg, KEY.jpeg, KEY.png or KEY.webp "
            "(the key ends at the first dot). Take it out of the shard list."
        )
        return FoundIndex(found.index, found.source, found.kept, DataError(text))
    return found


LOST = -1
"""Offset of an image that a damaged or missing tar has lost."""


def _join(
    found: FoundIndex, labels: Sequence[LabelShard], num_positives: int, with_captions: bool, shard: int
) -> ShardContents:
    """labels: of the same tar, from each of the folders."""
    index, keys = found.index, _keys(found, labels)
    joined = np.full((len(keys), len(labels), num_positives), NO_LABEL, np.int32)
    labelled = np.ones(len(keys), bool)
    for folder, own in enumerate(labels):
        wanted = _rows(keys, own)
        joined[wanted >= 0, folder] = own.labels[wanted[wanted >= 0], :num_positives]
        labelled &= wanted >= 0
    there = index.members
    places = np.array([index.image(key) if key in there else (LOST, 0) for key in keys], np.int64).reshape(-1, 2)
    encoded = np.array([key.encode() for key in keys], np.bytes_)
    captions = None
    if with_captions:
        captions = np.array([_caption_place(there.get(key, {})) for key in keys], np.int64).reshape(-1, 3)
        labelled = (captions[:, 2] >= 0) | (places[:, 0] == LOST)  # what is lost had one, for all we know
    columns = places[:, 0], places[:, 1], joined.reshape(len(keys), -1 if len(labels) else 0)
    contents = ShardContents(index.path, encoded, *columns, labelled, captions, shard=shard, state=index.state)
    if found.damage is None:
        return contents
    problem = "missing_tar" if isinstance(found.damage, MissingTarError) else "damaged_tar"
    return replace(contents, problem=problem, damage=str(found.damage))


def _caption_place(members: dict[str, tuple[int, int]]) -> tuple[int, int, int]:
    extension = caption_extension(members)
    return (0, 0, -1) if extension is None else (*members[extension], EXTENSIONS.index(extension))


def _keys(found: FoundIndex, labels: Sequence[LabelShard]) -> Sequence[str]:
    """Keys of a tar's images; of a damaged tar, of all that it must have had: by an index of before, else by its labels,
    which may stand in another order.
    """
    if found.damage is None:
        return found.index.keys
    there = found.index.members
    if found.keys_before and there.keys() <= set(found.keys_before):
        return found.keys_before
    return [*found.index.keys, *(key for own in labels[:1] for key in own.keys if key not in there)]


def _all_lost(contents: ShardContents, count: int) -> ShardContents:
    """Of a tar that is so damaged that its images cannot be told: `count` that are lost, without a name."""
    return replace(
        contents,
        keys=np.full(count, b""),
        offsets=np.full(count, LOST, np.int64),
        sizes=np.zeros(count, np.int64),
        labels=np.full((count, contents.labels.shape[1]), NO_LABEL, np.int32),
        labelled=np.ones(count, bool),
        captions=None if contents.captions is None else np.tile([0, 0, -1], (count, 1)),
    )


def _digest(keys: Sequence[str]) -> int:
    """64 bits of keys, which hold no NUL, in their order."""
    text = "\0".join(keys).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def without_positive(contents: ShardContents, heads: int) -> np.ndarray:
    """bool [n]: the images whose list is empty in one of `heads` label files that have them all."""
    nearest = contents.labels.reshape(len(contents), heads, -1)[:, :, :1] if heads else contents.labels
    return contents.labelled & (nearest == NO_LABEL).reshape(len(contents), -1).any(axis=1)


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rows(keys: Sequence[str], labels: LabelShard) -> np.ndarray:
    """int64 [n]: the row of each key in a label file, -1 where it has none."""
    rows = {key: row for row, key in enumerate(labels.keys)}
    return np.array([rows.get(key, -1) for key in keys], np.int64)


def _listed(items: Sequence) -> str:
    return " and ".join(map(str, items))


def missing_tar(damage: DataError) -> DataError:
    """The error for a tar that is missing, where none may be."""
    return DataError(f"{damage} Fetch it, or go on without it by --allow_missing_shards.")


@dataclass
class _Found:
    """What one rank learnt about one shard, to be exchanged."""

    shard: int
    count: int = 0
    key_set: int = 0
    key_order: int | None = None
    infos: tuple[LabelsInfo, ...] = ()
    unlabelled: tuple[str, ...] = ()
    num_unlabelled: int = 0
    lacking_in: tuple[int, ...] = ()  # images without a label, by folder
    duplicates: int = 0
    ignored: int = 0
    without_image: int = 0
    unfit_index: bool = False
    lost: int = 0
    damage: str = ""
    surplus_labels: int = 0
    without_positive: int = 0
    vanished: int = 0  # keys of its label files that it lacks
    lacking_images: int = 0  # fewer than its _stats.json says
    missing_labels: Path | None = None  # the folder
    error: str | None = None


def build_shard_table(
    shards: Sequence[str],
    labels_dirs: Sequence[str | Path],
    num_positives: int,
    max_skipped_fraction: float,
    cache_dir: str | None,
    topology: Topology,
    captions: bool = False,
    *,
    index_folder: Path | None = None,
    allow_missing: bool = False,
    allow_pipe: bool = False,
) -> ShardTable:
    """Walks all tars (or reads their indexes, see tar_index.py), each rank its share, checks them against their labels, and
    tells every rank the result.

    labels_dirs: folders of labels, one per head; an image must be in all of them. captions: there are none, the images'
    captions in the tars take their place. num_positives: labels an image and folder to use. cache_dir: where remote tars
    are fetched to. index_folder: see `tar_index.examine`; None: no index is written. allow_missing: whether tars may be
    missing. allow_pipe: see `local_shard`.
    A tar that is damaged, missing or without images is quarantined: what comes before its damage is used, the images that it
    has lost (by an index of before, else by its labels) are counted, and skipped in every epoch.
    Raises DataError, the same on every rank, when more than `max_skipped_fraction` of the images are lost so, or lack
    a label, or of the labels are of images that their tar lacks; when a tar is remote and there is no cache_dir, or
    is missing and may not be, or nothing tells what it held; when label files are missing, of different centers
    within a folder or with fewer labels than num_positives, or a label is not below k.
    One all-gather of a few bytes per shard.
    """
    if not shards:
        raise DataError("no shards: name the image tars with --shards")
    remote = next((shard for shard in shards if is_url(shard)), None)
    if remote is not None and cache_dir is None:
        local_shard(remote, None, allow_pipe)  # refuses: a flag that lacks is no tar that is missing
    labels_dirs = tuple(Path(folder) for folder in labels_dirs)
    look = partial(look_into, cache_dir=cache_dir, allow_pipe=allow_pipe, index_folder=index_folder)
    kept: dict[int, ShardContents] = {}
    own = []
    for shard in range(topology.rank, len(shards), topology.world_size):
        own.append(_examine(shard, shards[shard], look, labels_dirs, num_positives, allow_missing, kept, captions))
    found = [entry for part in gather_objects(own, topology) for entry in part]
    found.sort(key=lambda entry: entry.shard)
    names = tuple(shard_name(shard) for shard in shards)
    _raise_problems(found, names)
    for head, folder in enumerate(labels_dirs):
        check_same_labels([(label_path(folder, names[entry.shard]), entry.infos[head]) for entry in found])
        check_enough_labels(folder, found[0].infos[head], num_positives)
    _check_lost(found, max_skipped_fraction)
    _check_unlabelled(found, shards, labels_dirs, max_skipped_fraction)
    _check_vanished(found, shards, max_skipped_fraction)
    return ShardTable(
        shards=tuple(shards),
        names=names,
        counts=tuple(entry.count for entry in found),
        labels_dirs=labels_dirs,
        num_positives=num_positives,
        cache_dir=cache_dir,
        labels_infos=found[0].infos,
        without_label=sum(entry.num_unlabelled for entry in found),
        without_positive=sum(entry.without_positive for entry in found),
        duplicates=sum(entry.duplicates for entry in found),
        ignored=sum(entry.ignored for entry in found),
        without_image=sum(entry.without_image for entry in found),
        surplus_labels=sum(entry.surplus_labels for entry in found),
        lacking_images=sum(entry.lacking_images for entry in found),
        lacking_tar=next((shards[entry.shard] for entry in found if entry.lacking_images), ""),
        captions=captions,
        unfit_indexes=sum(entry.unfit_index for entry in found),
        quarantined=tuple((entry.shard, entry.lost, entry.damage) for entry in found if entry.damage),
        index_folder=index_folder,
        allow_pipe=allow_pipe,
        key_sets=tuple(entry.key_set for entry in found),
        key_orders=tuple(entry.key_order for entry in found),
        kept=kept,
    )


def _examine(
    shard: int,
    path: str,
    look: Callable[[str], FoundIndex],
    labels_dirs: Sequence[Path],
    num_positives: int,
    allow_missing: bool,
    kept: dict[int, ShardContents],
    captions: bool,
) -> _Found:
    """Never raises: what went wrong has to reach the other ranks, which wait in the collective that follows."""
    found = _Found(shard)
    try:
        found_index = look(path)
        if isinstance(found_index.damage, MissingTarError) and not allow_missing:
            raise missing_tar(found_index.damage)
        index = found_index.index
        found.unfit_index = found_index.source in ("stale", "damaged") and not found_index.kept
        found.duplicates, found.ignored = index.duplicates, index.ignored
        found.without_image = len(index.without_image)
        files = [label_path(folder, shard_name(path)) for folder in labels_dirs]
        found.missing_labels = next((file.parent for file in files if not file.is_file()), None)
        if found.missing_labels is not None:
            return found
        labels = [read_label_shard(file) for file in files]
        found.infos = tuple(shard_labels.info for shard_labels in labels)
        if min((info.num_positives for info in found.infos), default=num_positives) < num_positives:
            return found
        contents = _join(found_index, labels, num_positives, captions, shard)
        if not len(contents):
            missing = isinstance(found_index.damage, MissingTarError)
            untold = " No index of before tells which images it held: take it out of --shards." if missing else ""
            raise DataError(f"{found_index.damage}{untold}")
        keys = _keys(found_index, labels)
        found.count, found.damage = len(contents), contents.damage
        in_order = found_index.damage is None or keys is found_index.keys_before
        found.key_set, found.key_order = _digest(sorted(keys)), _digest(keys) if in_order else None
        found.lost = int(((contents.offsets == LOST) & contents.labelled).sum())
        found.lacking_in = tuple(int((_rows(keys, shard_labels) < 0).sum()) for shard_labels in labels)
        found.surplus_labels = sum(
            len(shard_labels.keys) - len(keys) + lacking
            for shard_labels, lacking in zip(labels, found.lacking_in, strict=True)
        )
        found.vanished = len({key for own in labels for key in own.keys} - set(keys)) if found.surplus_labels else 0
        if not found.damage and not is_url(path):
            found.lacking_images = max(0, stated_samples(path) - len(index.keys) - len(index.without_image))
        found.without_positive = int((without_positive(contents, len(labels)) & (contents.offsets != LOST)).sum())
        lacking = np.nonzero(~contents.labelled)[0]
        found.num_unlabelled = len(lacking)
        found.unlabelled = tuple(contents.key(row) for row in lacking[:3])
        if sum(map(len, kept.values())) + len(contents) <= KEPT_SAMPLES:
            kept[shard] = contents
    except DataError as error:
        found.error = str(error)
    except Exception as error:
        found.error = f"reading {path} and its labels failed: {type(error).__name__}: {error}"
    return found


def _raise_problems(found: list[_Found], names: Sequence[str]) -> None:
    errors = [entry.error for entry in found if entry.error]
    if errors:
        more = f" ({len(errors) - 1} more of the {len(found)} shards cannot be used either)" if errors[1:] else ""
        raise DataError(errors[0] + more)
    folder = next((entry.missing_labels for entry in found if entry.missing_labels), None)
    if folder is not None:
        if not folder.is_dir():
            raise DataError(f"the label folder {folder} does not exist. Write it with tools/assign_labels.py.")
        missing = [names[entry.shard] for entry in found if entry.missing_labels == folder]
        raise DataError(missing_labels(folder, missing, len(found)))


def _check_lost(found: list[_Found], allowed: float) -> None:
    lost, total = sum(entry.lost for entry in found), sum(entry.count for entry in found)
    if lost <= allowed * total:
        return
    damages = [entry.damage for entry in found if entry.lost]
    more = f" ({len(damages) - 1} more of the {len(found)} shards cannot be used whole either)" if damages[1:] else ""
    raise DataError(
        f"{damages[0]}{more} {lost} of {total} images are lost so, more than --max_skipped_fraction {allowed:g} allows."
    )


def _check_vanished(found: list[_Found], shards: Sequence[str], allowed: float) -> None:
    """Images that tars have lost without a trace are known by their labels, which are of each tar alone."""
    vanished, total = sum(entry.vanished for entry in found), sum(entry.count for entry in found)
    if vanished <= allowed * (total + vanished):
        return
    worst = sorted((entry for entry in found if entry.vanished), key=lambda entry: -entry.vanished)
    named = "; ".join(
        f"{shards[entry.shard]}: {entry.vanished} of {entry.count + entry.vanished}" for entry in worst[:3]
    )
    raise DataError(
        f"{vanished} of {total + vanished} labelled images are not in their tars, more than --max_skipped_fraction "
        f"{allowed:g} allows. Most of them in {named}{' ...' if worst[3:] else ''}. Fetch or write these tars again; "
        "if they were meant to become smaller, write their labels again with tools/assign_labels.py, or raise the fraction."
    )


def _check_unlabelled(found: list[_Found], shards: Sequence[str], labels_dirs: Sequence[Path], allowed: float) -> None:
    lacking, total = sum(entry.num_unlabelled for entry in found), sum(entry.count for entry in found)
    if lacking <= allowed * total:
        return
    worst = max(found, key=lambda entry: entry.num_unlabelled)
    if not labels_dirs:
        raise DataError(
            f"{lacking} of {total} images have no caption (neither KEY.txt nor KEY.json), more than --max_skipped_fraction "
            f"{allowed:g} allows. Most of them in {shards[worst.shard]}: {worst.num_unlabelled} of {worst.count}, e.g. "
            f"{', '.join(worst.unlabelled)}. Train on tars with captions, or raise the fraction."
        )
    where = str(labels_dirs[0])
    if len(labels_dirs) > 1:
        numbers = [sum(entry.lacking_in[head] for entry in found) for head in range(len(labels_dirs))]
        where = " or ".join(f"{folder} ({number})" for folder, number in zip(labels_dirs, numbers, strict=True))
    raise DataError(
        f"{lacking} of {total} images have no label in {where}, more than --max_skipped_fraction {allowed:g} allows. "
        f"Most of them in {shards[worst.shard]}: {worst.num_unlabelled} of {worst.count}, e.g. "
        f"{', '.join(worst.unlabelled)}. Are these the labels of these tars? Write them with tools/assign_labels.py."
    )


class ShardReader:
    """Reads single samples of a `ShardTable`; each process has its own.

    memory_samples: samples whose places and labels may stay in memory at a time.
    """

    def __init__(self, table: ShardTable, memory_samples: int):
        self.table, self.memory_samples = table, memory_samples
        self._contents: OrderedDict[int, ShardContents] = OrderedDict()
        self._samples = 0
        self._files: OrderedDict[Path, OpenTar] = OrderedDict()
        self._refused: set[Path] = set()  # tars that a bad disk does not let open: waited for once

    def contents(self, shard: int) -> ShardContents:
        """Places and labels of a shard, read on first use."""
        if shard in self._contents:
            self._contents.move_to_end(shard)
            return self._contents[shard]
        contents = self._contents[shard] = self.table.load(shard)
        self._samples += len(contents)
        while self._samples > self.memory_samples and len(self._contents) > 1:
            _, oldest = self._contents.popitem(last=False)
            self._samples -= len(oldest)
        return contents

    def image_bytes(self, contents: ShardContents, index: int) -> bytes:
        """The encoded image.

        Raises ImageError, its reason one of TAR_PROBLEMS, where the tar has lost it; UnreadableError where the machine is to
        blame, or the tar became another whole one (ChangedTarError).
        """
        return self._bytes(contents, lambda now: (int(now.offsets[index]), int(now.sizes[index])))

    def caption(self, contents: ShardContents, index: int) -> str:
        """The caption of an image. Raises CaptionError where there is none that can be used, ImageError as `image_bytes`."""
        if contents.offsets[index] == LOST:
            raise ImageError(contents.problem, contents.damage)
        kind = int(contents.captions[index, 2])
        if kind < 0:
            raise CaptionError("no_caption", "its tar has neither KEY.txt nor KEY.json")

        def place(now: ShardContents) -> tuple[int, int]:
            *found, extension = now.captions[index].tolist()
            return tuple(found) if extension == kind and now.offsets[index] != LOST else (LOST, 0)

        return read_caption(EXTENSIONS[kind], self._bytes(contents, place))

    def _bytes(self, contents: ShardContents, place: Callable[[ShardContents], tuple[int, int]]) -> bytes:
        """What lies at (offset, size) = place(contents), or, where the tar broke since, at that place of what is left."""
        try:
            return self._read(contents, *place(contents))
        except ChangedTarError:
            self._forget(contents.path)
            contents = self._contents[contents.shard] = self.table.load_again(contents)
        try:
            return self._read(contents, *place(contents))
        except ChangedTarError as error:
            raise ImageError("damaged_tar", f"something writes into it: {error}") from None

    def _read(self, contents: ShardContents, offset: int, size: int) -> bytes:
        """Raises ChangedTarError where the tar is not the one that was examined: before, and after it was read."""
        if offset == LOST:
            raise ImageError(contents.problem, contents.damage)
        try:
            tar = self._file(contents)
            data = tar.read(offset, offset + size)
            tar.check()
        except FileNotFoundError:
            raise ImageError("missing_tar", f"the tar {contents.path} is gone") from None
        except OSError as error:
            raise ImageError("damaged_tar", f"cannot read the tar {contents.path}: {error.strerror}") from None
        if len(data) != size:
            raise ImageError("damaged_tar", f"the tar {contents.path} became shorter while it was read")
        return data

    def close(self) -> None:
        """Closes the open tars."""
        while self._files:
            self._files.popitem()[1].close()

    def _forget(self, path: Path) -> None:
        if path in self._files:
            self._files.pop(path).close()

    def _file(self, contents: ShardContents) -> OpenTar:
        path = contents.path
        if path in self._files and self._files[path].state != contents.state:
            self._forget(path)  # of a file that another has replaced
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        if len(self._files) >= MAX_OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        waits = () if path in self._refused else RETRY_SECONDS
        try:
            tar = self._files[path] = OpenTar(path, waits, contents.state)
        except FileNotFoundError:
            raise
        except OSError:
            self._refused.add(path)
            raise
        return tar
