"""The page about clusters: its numbers against plain dense computations, what it loads (nothing), what it refuses."""

import base64
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from data_factory import picture
from processes import ROOT, run_script

from mlcd_ds.batch import NO_LABEL
from mlcd_ds.clustering.charts import Series, bar_chart, histogram
from mlcd_ds.clustering.inspect import inspect_clusters
from mlcd_ds.clustering.label_statistics import COSINE_BINS, NOBODY, LabelStatistics, NearestImages, cosine_histogram
from mlcd_ds.config import InspectConfig
from mlcd_ds.data.centers import save_centers
from mlcd_ds.data.labels import LabelsInfo, read_label_shard, write_label_shard
from mlcd_ds.data.tars import write_tar
from mlcd_ds.errors import DataError
from mlcd_ds.evaluation.agreement import ImageClasses, agreement
from mlcd_ds.files import write_json

K, L, DIM = 30, 4, 8


def random_labels(generator, n, k=K, l=L, shortest=0):
    """Distinct labels and falling cosines of few values (so that some are equal), some rows cut short."""
    labels = np.stack([generator.permutation(k)[:l] for _ in range(n)]).astype(np.int32)
    cosines = -np.sort(-generator.integers(-5, 20, labels.shape) / 20, axis=1)
    cut = np.arange(l) >= generator.integers(shortest, l + 1, n)[:, None]
    labels[cut], cosines[cut] = NO_LABEL, 0
    return labels, cosines.astype(np.float16)


# ---------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("block", [7, 100, 1000])
def test_counts_equal_the_dense_ones_for_any_blocks(block):
    labels, cosines = random_labels(np.random.default_rng(0), 400)
    statistics = LabelStatistics(LabelsInfo(K, L, "hash", "toy"), kept=5)
    for start in range(0, 400, block):
        statistics.add(labels[start : start + block], cosines[start : start + block])
    there = labels >= 0
    some = there.any(1)
    assert statistics.num_images == 400 and not some.all()
    for c in range(K):
        mine = labels[:, 0] == c
        assert statistics.sizes_k[c] == mine.sum()
        assert statistics.mentions_k[c] == (labels == c).sum()
        assert statistics.mean_cosine_k[c] == pytest.approx(cosines[mine, 0].astype(float).mean(), nan_ok=True)
    assert statistics.labels_histogram.tolist() == np.bincount(there.sum(1), minlength=L + 1).tolist()
    last = [row[count - 1] for row, count in zip(cosines, there.sum(1), strict=True) if count]
    for found, values in ((statistics.nearest_histogram, cosines[some, 0]), (statistics.last_histogram, last)):
        bins = [min(math.floor((float(value) + 1) * 200 + 1e-9), 399) for value in values]
        assert np.abs(found - np.bincount(bins, minlength=COSINE_BINS)).sum() <= 2 * len(bins) * 0.01
    assert statistics.nearest_histogram.sum() == statistics.last_histogram.sum() == some.sum()


@pytest.mark.parametrize("block", [1, 13, 500])
def test_nearest_images_are_the_highest_cosines_the_earlier_first(block):
    labels, cosines = random_labels(np.random.default_rng(1), 300)
    nearest = NearestImages(K, 6)
    for start in range(0, 300, block):
        nearest.add(start, labels[start : start + block], cosines[start : start + block])
    for c in range(K):
        rows, columns = np.nonzero(labels == c)
        found = sorted(zip((-cosines[rows, columns]).tolist(), rows.tolist(), strict=True))[:6]
        assert nearest.of(c, 6) == [(row, -cosine) for cosine, row in found]
        assert nearest.of(c, 2, without=found[0][1]) == [(row, -cosine) for cosine, row in found[1:3]]
    few = NearestImages(3, 4)
    few.add(10, np.array([[2, 0]], np.int32), np.array([[0.5, -0.25]], np.float16))
    assert few.of(2, 4) == [(10, 0.5)] and few.of(0, 4) == [(10, -0.25)] and few.of(1, 4) == []
    assert few.keys_kt[1].tolist() == [NOBODY] * 4


def test_cosines_beyond_one_count_in_the_outer_bins():
    found = cosine_histogram(np.array([-1.0002, -1, 0, 0.9999, 1, 1.0005]))
    assert (found[0], found[200], found[-1], found.sum()) == (2, 1, 3, 6)


# ---------------------------------------------------------------------------------------------- agreement


def test_agreement_of_single_classes_equals_scikit_learn():
    from sklearn.metrics import normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    generator = np.random.default_rng(0)
    for k, classes in ((5, 3), (40, 7), (1, 4), (6, 1)):
        true = generator.integers(0, classes, 500)
        cluster = (true * 3 + generator.integers(0, 4, 500)) % k
        found = agreement(cluster, ImageClasses.of([(int(c) * 1000,) for c in true]))
        table = contingency_matrix(true, cluster)
        assert found.purity == pytest.approx(table.max(0).sum() / 500)
        assert found.nmi == pytest.approx(normalized_mutual_info_score(true, cluster), abs=1e-12)
        assert found.clusters.tolist() == np.unique(cluster).tolist()
        assert found.majority.tolist() == (np.unique(true)[table.argmax(0)] * 1000).tolist()
        assert found.majority_share.tolist() == (table.max(0) / table.sum(0)).tolist()
        assert (found.images, found.left_out, found.num_classes) == (500, 0, len(table))


def test_agreement_of_several_classes_and_of_images_without():
    classes = [(1, 2), (2,), (), (1,), (3,), (3,)]
    found = agreement(np.array([0, 0, 0, 1, 1, NO_LABEL]), ImageClasses.of(classes))
    assert (found.images, found.left_out, found.num_classes) == (4, 2, 3)
    assert found.majority.tolist() == [2, 1] and found.majority_share.tolist() == [1.0, 0.5]
    assert found.purity == 3 / 4
    joint = np.array([[0.5, 1.5, 0], [1, 0, 1]]) / 4
    rows, columns = joint.sum(1), joint.sum(0)
    information = sum(p * math.log(p / rows[i] / columns[j]) for (i, j), p in np.ndenumerate(joint) if p)
    entropies = [-sum(p * math.log(p) for p in side) for side in (rows, columns)]
    assert found.nmi == pytest.approx(information / (sum(entropies) / 2))
    none = agreement(np.array([NO_LABEL]), ImageClasses.of([(1,)]))
    assert (none.purity, none.nmi, none.images, none.left_out) == (0.0, 0.0, 0, 1)


def test_a_million_clusters_need_no_dense_table():
    generator = np.random.default_rng(0)
    cluster = generator.integers(0, 1_000_000, 20_000)
    found = agreement(cluster, ImageClasses.of([(int(c),) for c in generator.integers(0, 5000, 20_000)]))
    assert len(found.clusters) == len(np.unique(cluster)) and 0.9 < found.purity <= 1


# ---------------------------------------------------------------------------------------------- charts


def test_charts_are_valid_and_name_what_they_show():
    chart = bar_chart(["0", "1", "2-3"], [0, 5, 20], "images <b>", "clusters", ["none", "five & more", "twenty"])
    assert chart.count("<rect") == 3 and "five &amp; more" in chart and "images &lt;b&gt;" in chart
    values = [0.0] * COSINE_BINS
    values[300], values[301] = 0.25, 0.75
    chart = histogram([Series("first", values), Series("second", values[::-1])], -1, 1, "cosine", "images")
    assert chart.count("<polygon") == 2 and ">first</text>" in chart and ">second</text>" in chart
    for empty in (bar_chart([], [], "x", "y", []), histogram([Series("none", [0.0] * 10)], -1, 1, "x", "y")):
        assert "nan" not in empty and "inf" not in empty


# ---------------------------------------------------------------------------------------------- the page


@pytest.fixture
def prepared(tmp_path):
    """Two tars of pictures with classes, their labels, and centers."""
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(K, DIM))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    digest = save_centers(tmp_path / "c", centers, {"feature_model": "toy"})
    for shard, n in enumerate((30, 25)):
        keys = [f"{shard:05d}{row:04d}" for row in range(n)]
        write_tar(tmp_path / "tars" / f"{shard:05d}.tar", samples(keys))
        info = LabelsInfo(K, L, digest, "toy")
        labels, cosines = random_labels(generator, n, k=K - 5, shortest=1)  # the last five clusters stay empty
        write_label_shard(tmp_path / "l" / f"{shard:05d}.parquet", keys[::-1], labels, cosines, info)
    described = {"centers_hash": digest, "feature_model": "toy", "top": L, "threshold": -0.25}
    write_json(tmp_path / "l" / "labels.json", described)
    return tmp_path


def samples(keys, classes=lambda row: [row % 3, 7]):
    return [
        (key, {"jpg": picture(row), "json": json.dumps({"classes": classes(row)} if classes else {}).encode()})
        for row, key in enumerate(keys)
    ]


def look(folder, **changes):
    settings = {"shards": f"{folder}/tars/*.tar", "labels": f"{folder}/l", "centers": f"{folder}/c"}
    settings |= {"output": f"{folder}/page/clusters.html", "images": 3, "nearest_images": 4}
    report = inspect_clusters(InspectConfig(**settings | changes))
    return report, (folder / "page" / "clusters.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Checks that elements close in order, and collects tags, links, pictures and text."""

    VOID = ("meta", "link", "img", "br", "rect", "line", "polygon")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.ids, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "data", "action", "srcset")]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> does not close what is open: {self.open}"

    def handle_data(self, text):
        self.words.append(text)


def test_the_page_is_whole_and_loads_nothing(prepared):
    report, text = look(prepared)
    page = Page(text)
    assert "script" not in page.tags and "iframe" not in page.tags and "@import" not in text and "url(" not in text
    assert all(link.startswith(("data:", "#")) for link in page.links), page.links
    assert {link[1:] for link in page.links if link.startswith("#")} == set(page.ids)
    pictures = [link for link in page.links if link.startswith("data:image/jpeg;base64,")]
    assert len(pictures) > 50 and len(pictures) == page.tags.count("img")
    assert all(base64.b64decode(link.partition(",")[2])[:2] == b"\xff\xd8" for link in pictures)
    words = "".join(page.words)
    for wanted in (
        "only centers of at least cosine -0.25",
        "Random clusters",
        "Loosest clusters",
        "Purity",
        "Labels an image",
    ):
        assert wanted in words, wanted
    assert report.empty >= 5 and f"{report.empty} (" in words
    assert "http" not in text and "nan" not in words


def test_what_the_page_says_is_what_the_labels_say(prepared):
    report, _ = look(prepared, giant_factor=1.5, class_names=str(names_file(prepared)))
    shards = [read_label_shard(prepared / "l" / f"{s:05d}.parquet") for s in (0, 1)]
    labels = np.concatenate([s.labels for s in shards])
    cosines = np.concatenate([s.cosines for s in shards])
    keys = [key for s in shards for key in s.keys]
    sizes = np.bincount(labels[:, 0], minlength=K)
    assert report.giants.tolist() == sizes[sizes > 1.5 * 55 / K].tolist()
    for view in (view for group in report.clusters.values() for view in group):
        assert view.size == sizes[view.number]
        rows, columns = np.nonzero(labels == view.number)
        best = sorted(zip((-cosines[rows, columns]).tolist(), rows.tolist(), strict=True))[:4]
        assert view.nearest == [(row, -cosine) for cosine, row in best]
    for row in report.labelled_images:
        assert [view.number for view in row.labels] == [c for c in labels[row.place].tolist() if c >= 0]
        assert all(place != row.place for view in row.labels for place, _ in view.nearest)
    for place, view in report.images.items():
        row = int(keys[place][5:])
        assert view.key == keys[place]
        assert view.classes == f"{['cat', 'dog & co', 'eel'][row % 3]}, h"
    centers = np.load(prepared / "c" / "centers.npy").astype(np.float64)
    pairs = [centers[a] @ centers[b] for own in labels for i, a in enumerate(own) for b in own[:i] if min(a, b) >= 0]
    assert report.overlap.pair_histogram.sum() == len(pairs)
    assert report.overlap.mean_cosine == pytest.approx(np.mean(pairs), abs=1e-6)
    near = look(prepared, near_cosine=0.5)[0].overlap
    expected = [
        max([centers[a] @ centers[b] for i, a in enumerate(own) for b in own[:i]])
        for own in ([c for c in row if c >= 0] for row in labels.tolist())
        if len(own) > 1
    ]
    assert near.images == len(expected) and near.near_share == pytest.approx(np.mean(np.array(expected) > 0.5))
    classes = report.classes
    assert classes.agreement.purity == 1.0 and classes.classes_per_image == 2.0  # class 7 is everywhere
    assert classes.commonest == ("h", 1.0)
    majority = dict(zip(classes.agreement.clusters.tolist(), classes.agreement.majority.tolist(), strict=True))
    for column in range(L):  # clusters that are nearest to no image have no majority
        known = [(c, int(key[5:])) for c, key in zip(labels[:, column].tolist(), keys, strict=True) if c in majority]
        expected = [majority[c] in (row % 3, 7) for c, row in known]
        assert classes.share_by_label[column] == pytest.approx(np.mean(expected))


def names_file(folder):
    file = folder / "names.txt"
    file.write_text("cat\ndog & co\neel\nd\ne\nf\ng\nh\n")
    return file


def test_the_same_seed_gives_the_same_page(prepared):
    first, again, other = (look(prepared, seed=seed)[1] for seed in (0, 0, 1))
    assert first == again != other


def test_without_true_classes_the_page_says_so(prepared):
    for shard, n in enumerate((30, 25)):
        keys = [f"{shard:05d}{row:04d}" for row in range(n)]
        write_tar(prepared / "tars" / f"{shard:05d}.tar", samples(keys, classes=None))
    report, text = look(prepared)
    Page(text)
    assert report.classes is None and "The tars name no true classes" in text
    with pytest.raises(DataError, match="has no true classes"):
        look(prepared, true_classes="yes")


def test_a_broken_image_has_its_reason_in_the_page(prepared):
    keys = [f"00000{row:04d}" for row in range(30)]
    broken = [(key, {**members, "jpg": b"no image"}) for key, members in samples(keys)]
    write_tar(prepared / "tars" / "00000.tar", broken)
    report, text = look(prepared)
    assert report.unreadable > 0 and "cannot be shown: not_an_image" in text


# ---------------------------------------------------------------------------------------------- refused


def test_what_does_not_belong_together_is_refused(prepared):
    write_tar(prepared / "tars" / "00001.tar", samples([f"99999{row:04d}" for row in range(25)]))
    for how in ("yes", "no"):
        with pytest.raises(DataError, match=r"00001.tar has no image '00001\d{4}'.*labels of other tars"):
            look(prepared, true_classes=how, images=50)
    write_tar(prepared / "tars" / "00002.tar", samples(["000020000"]))
    with pytest.raises(DataError, match=r"1 of 3 shards have no label file in .*00002.parquet"):
        look(prepared)
    assert not (prepared / "page" / "clusters.html").exists()


def test_other_centers_are_refused(prepared):
    with pytest.raises(DataError, match="does not exist: give the folder that tools/cluster.py wrote"):
        look(prepared, centers=f"{prepared}/nowhere")
    save_centers(prepared / "other", np.eye(K, DIM), {"feature_model": "toy"})
    with pytest.raises(DataError, match=r"labels.json: labels of the centers .*SHA-256 of centers.npy"):
        look(prepared, centers=f"{prepared}/other")
    (prepared / "l" / "labels.json").unlink()
    with pytest.raises(DataError, match=r"/l: labels of the centers "):
        look(prepared, centers=f"{prepared}/other")
    _, text = look(prepared)
    assert "the folder has no labels.json" in text
    (prepared / "l" / "labels.json").write_text("[1")
    with pytest.raises(DataError, match="labels.json cannot be read"):
        look(prepared)


def test_labels_without_any_label_and_a_folder_as_output_are_refused(prepared):
    with pytest.raises(DataError, match="is a folder: name the HTML file"):
        look(prepared, output=str(prepared))
    for path in (prepared / "l").glob("*.parquet"):
        shard = read_label_shard(path)
        none = np.full(shard.labels.shape, NO_LABEL)
        write_label_shard(path, shard.keys, none, np.zeros(none.shape), shard.info)
    with pytest.raises(DataError, match="none of the 55 images"):
        look(prepared)


def test_the_tool_says_what_it_found(prepared):
    flags = [f"--shards={prepared}/tars/*.tar", f"--labels={prepared}/l", f"--centers={prepared}/c"]
    ended = run_script(1, [ROOT / "tools" / "inspect_clusters.py", *flags, f"--output={prepared}/out.html"], fresh=True)
    assert ended[0].code == 0, ended[0].output
    assert "out.html: 55 images, 30 clusters; " in ended[0].output and "purity 1.000" in ended[0].output
    Page((prepared / "out.html").read_text())
