"""What was found out about clusters, as one HTML page that loads nothing: style, charts and thumbnails are inside it.

Shapes: k clusters, l labels an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

from mlcd_ds.clustering.charts import Series, bar_chart, coarser, histogram
from mlcd_ds.clustering.label_statistics import COSINE_BINS, LabelStatistics
from mlcd_ds.config import InspectConfig
from mlcd_ds.data.labels import LabelsInfo
from mlcd_ds.evaluation.agreement import Agreement

WIDEST_BINS = 4
"""Bins of 0.005 that are drawn as one where the histogram is wide."""
BINS_DRAWN = 120


@dataclass(frozen=True)
class ImageView:
    """source: data: URI of the thumbnail, or "" with the problem. classes: the true ones, in words; "" for none."""

    shard: str
    key: str
    source: str
    problem: str
    classes: str


@dataclass(frozen=True)
class ClusterView:
    """size, mentions, mean_cosine: see LabelStatistics. majority: commonest true class and its share, None without.
    nearest: (place, cosine) of images. cosine: as a label of an image, that image's cosine to it."""

    number: int
    size: int
    mentions: int
    mean_cosine: float
    majority: tuple[str, float] | None
    nearest: list[tuple[int, float]]
    cosine: float | None = None


@dataclass(frozen=True)
class LabelledImageView:
    """An image, by its place, and the clusters of its labels, nearest first."""

    place: int
    labels: list[ClusterView]


@dataclass(frozen=True)
class Overlap:
    """images: sampled ones with two labels or more. pair_histogram, random_histogram: int64 [COSINE_BINS], cosines between
    centers of one image's labels, and of random centers. mean_cosine: of the first. near_share: share of the images
    that have two labels nearer than --near_cosine."""

    images: int
    pair_histogram: np.ndarray
    random_histogram: np.ndarray
    mean_cosine: float
    near_share: float


@dataclass(frozen=True)
class Classes:
    """agreement of clusters with true classes, and shuffled: the same with the images dealt out anew to clusters of the
    same sizes. commonest: class and share of the images that have it. share_by_label: [l] share of the sampled images that
    have the majority class of their first, second ... label; share_by_chance: [l] of another image's label."""

    agreement: Agreement
    shuffled: Agreement
    classes_per_image: float
    commonest: tuple[str, float] | None
    sampled: int
    share_by_label: list[float]
    share_by_chance: list[float]


@dataclass(frozen=True)
class Report:
    """All that the page shows. described: labels.json. clusters: by title of their group. images: by place."""

    config: InspectConfig
    info: LabelsInfo
    described: dict
    num_shards: int
    statistics: LabelStatistics
    overlap: Overlap
    classes: Classes | None
    clusters: dict[str, list[ClusterView]]
    labelled_images: list[LabelledImageView]
    fewest_images: int
    images: dict[int, ImageView] = field(repr=False)

    @property
    def empty(self) -> int:
        """Clusters that are nearest to no image."""
        return int((self.statistics.sizes_k == 0).sum())

    @property
    def giants(self) -> np.ndarray:
        """int64, sizes of the clusters above `giant_factor` times the mean size."""
        sizes_k = self.statistics.sizes_k
        return sizes_k[sizes_k > self.config.giant_factor * sizes_k.sum() / len(sizes_k)]

    @property
    def unreadable(self) -> int:
        """Images shown as a reason instead of a thumbnail."""
        return sum(1 for view in self.images.values() if view.problem)


STYLE = """
body { font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff;
       max-width: 1100px; margin: 24px auto; padding: 0 20px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 36px 0 6px; border-bottom: 1px solid #ccc; }
h3 { font-size: 16px; margin: 22px 0 4px; } p { max-width: 800px; margin: 6px 0; }
.table { overflow-x: auto; } table { border-collapse: collapse; margin: 10px 0; }
td, th { padding: 3px 14px 3px 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } tr + tr { border-top: 1px solid #e4e4e4; }
nav a { margin-right: 16px; white-space: nowrap; display: inline-block; } a { color: #1f5fa8; }
svg { display: block; margin: 8px 0; max-width: 100%; height: auto; } svg text { font-size: 12px; fill: #333; }
.row { display: flex; flex-wrap: wrap; gap: 8px; margin: 6px 0 4px; }
figure { margin: 0; width: 100px; font-size: 12px; line-height: 1.3; }
figure img, .gone { width: 100px; height: 100px; object-fit: contain; background: #f1f1f1; display: block; }
.gone { font-size: 11px; color: #8a1c1c; display: flex; align-items: center; justify-content: center; text-align: center; }
figcaption { overflow-wrap: anywhere; } .small { font-size: 13px; color: #444; }
.image { display: grid; grid-template-columns: 150px 1fr; gap: 20px; margin: 16px 0; padding-top: 14px;
         border-top: 1px solid #ccc; }
.image > figure { width: 140px; } .image > figure img { width: 140px; height: 140px; }
.labels { display: grid; grid-template-columns: repeat(auto-fill, minmax(205px, 1fr)); gap: 12px; }
.label { border: 1px solid #ddd; padding: 6px 8px; font-size: 12px; line-height: 1.35; }
.label .row { gap: 4px; } .label figure, .label img, .label .gone { width: 58px; } .label img, .label .gone { height: 58px; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px; overflow-wrap: anywhere; }
"""


def render(report: Report) -> str:
    """The whole page."""
    sections = [
        ("sizes", "Sizes of the clusters", _sizes(report)),
        ("cosines", "How near the images are to their labels", _cosines(report)),
        ("overlap", "How much an image's labels overlap", _overlap(report)),
        ("classes", "Agreement with true classes", _classes(report)),
        ("clusters", "Some clusters and their nearest images", _clusters(report)),
        ("images", "Some images and their labels", _labelled_images(report)),
    ]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "".join(f'<section><h2 id="{name}">{title}</h2>{text}</section>' for name, title, text in sections)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>Clusters: {escape(report.config.labels)}</title><style>{STYLE}</style></head><body>"
        f"<h1>A look at {report.info.num_classes:,} clusters</h1>{_made_from(report)}<nav>{links}</nav>{body}"
        "</body></html>\n"
    )


def _made_from(report: Report) -> str:
    info, config, statistics = report.info, report.config, report.statistics
    if not report.described:
        threshold = "unknown: the folder has no labels.json"
    elif report.described.get("threshold") is None:
        threshold = f"none: every image has its {info.num_positives} nearest"
    else:
        threshold = f"only centers of at least cosine {report.described['threshold']:g}"
    rows = [
        ("Images", f"{statistics.num_images:,} in {report.num_shards:,} tars, <code>{escape(config.shards)}</code>"),
        (
            "Labels",
            f"<code>{escape(config.labels)}</code>, at most {info.num_positives} an image; threshold {threshold}",
        ),
        (
            "Centers",
            f"{info.num_classes:,} in <code>{escape(config.centers)}</code>, SHA-256 begins "
            f"<code>{escape(info.centers_hash[:12])}</code>",
        ),
        ("Features", f"<code>{escape(info.feature_model)}</code>"),
    ]
    intro = (
        "<p>Each cluster is a center that k-means found among the images' features. An image's labels are the centers "
        "nearest to it, by the cosine between feature and center (1: same direction, 0: unrelated). Below, an image "
        "<em>belongs to</em> the cluster of its first label, the nearest center, and <em>lists</em> the clusters of all its "
        "labels.</p>"
    )
    return intro + _table([], rows)


# ---------------------------------------------------------------------------------------------- numbers


def _sizes(report: Report) -> str:
    statistics, k = report.statistics, report.info.num_classes
    sizes_k = statistics.sizes_k
    images, mean, giants = int(sizes_k.sum()), float(sizes_k.mean()), report.giants
    names, values, hints = [], [], []
    for low, high in _doubling(int(sizes_k.max())):
        count = int(((sizes_k >= low) & (sizes_k <= high)).sum())
        names.append(_short(low) if low == high else f"{_short(low)}-{_short(high)}")
        values.append(count)
        hints.append(f"{count:,} clusters ({_percent(count / k)}) of {low:,} to {high:,} images")
    sizes = np.quantile(sizes_k, [0, 0.01, 0.1, 0.5, 0.9, 0.99, 1], method="nearest")
    half = (int(np.searchsorted(np.sort(sizes_k)[::-1].cumsum(), images / 2)) + 1) / k
    empty, factor = "none", report.config.giant_factor
    if report.empty:
        unlisted = int((statistics.mentions_k == 0).sum())
        empty = f"{report.empty:,} ({_percent(report.empty / k)}), nobody's nearest; {unlisted:,} of them nobody lists"
    giant = f"none of more than {factor:g} times the mean size"
    if len(giants):
        giant = (
            f"{len(giants):,} ({_percent(len(giants) / k)}) of more than {factor:g} times the mean size; "
            f"{_percent(giants.sum() / images)} of the images belong to them"
        )
    rows = [
        ("Mean size", f"{mean:,.1f} images a cluster"),
        ("Empty clusters", empty),
        ("Giant clusters", giant),
        ("Half of the images", f"belong to the largest {_percent(half)} of the clusters (50% if all were equal)"),
    ]
    if unlabelled := int(statistics.labels_histogram[0]):
        share = unlabelled / statistics.num_images
        rows.append(("Images without a label", f"{unlabelled:,} ({_percent(share)}): no center above the threshold"))
    heads = ["", "smallest", "1%", "10%", "median", "90%", "99%", "largest"]
    mentions = np.quantile(statistics.mentions_k, [0, 0.01, 0.1, 0.5, 0.9, 0.99, 1], method="nearest")
    quantiles = [
        ("Images that belong to a cluster", *(f"{size:,.0f}" for size in sizes)),
        ("Images that list it", *(f"{size:,.0f}" for size in mentions)),
    ]
    return (
        _table([], rows)
        + bar_chart(names, values, "images in the cluster", "clusters", hints)
        + "<p class='small'>From bar to bar the sizes double.</p>"
        + _table(heads, quantiles)
        + "<p class='small'>Column 10%: a tenth of the clusters have no more images than this; and so on.</p>"
    )


def _cosines(report: Report) -> str:
    statistics, l = report.statistics, report.info.num_positives
    nearest, last = (h / max(1, h.sum()) for h in (statistics.nearest_histogram, statistics.last_histogram))
    centers = (np.arange(COSINE_BINS) + 0.5) * (2 / COSINE_BINS) - 1
    rows = [
        (name, *(f"{_quantile(share, q):.3f}" for q in (0.01, 0.1, 0.5, 0.9, 0.99)), f"{float(share @ centers):.3f}")
        for name, share in (("nearest label", nearest), (_last_name(l), last))
    ]
    text = (
        "<p>How near an image is to the center of its first and of its last label. Where the two curves lie far apart, the "
        "last labels are much weaker than the first; where they coincide, images lie between many centers alike.</p>"
    )
    varied = statistics.labels_histogram[: l + 1]
    by_count = ""
    if (varied[:l] > 0).any():
        shares = [f"{count:,} images have {number} labels" for number, count in enumerate(varied.tolist())]
        by_count = "<h3>Labels an image</h3>" + bar_chart(
            [str(i) for i in range(l + 1)], varied.tolist(), "labels of the image", "images", shares
        )
    return (
        text
        + _histogram([Series("nearest label", nearest), Series(_last_name(l), last)], "cosine to center", "images")
        + _table(["", "1%", "10%", "median", "90%", "99%", "mean"], rows)
        + "<p class='small'>Column 1%: a hundredth of the images have a lower cosine; and so on (in steps of 0.005).</p>"
        + by_count
    )


def _overlap(report: Report) -> str:
    overlap, near = report.overlap, report.config.near_cosine
    if not overlap.images:
        return "<p>No image has two labels, so none overlap.</p>"
    own, drawn = (h / max(1, h.sum()) for h in (overlap.pair_histogram, overlap.random_histogram))
    text = (
        f"<p>The labels of {overlap.images:,} randomly drawn images, two at a time: the cosine between their centers. "
        "Near 1 the two labels are one concept twice; under the curve of random centers they have no more to do with each "
        f"other than any two. The mean is <b>{overlap.mean_cosine:.3f}</b>; <b>{_percent(overlap.near_share)}</b> of the "
        f"images have two labels whose centers are nearer than cosine {near:g}.</p>"
    )
    series = [Series("two labels of one image", own), Series("two random centers", drawn)]
    return text + _histogram(series, "cosine between the two centers", "pairs")


def _classes(report: Report) -> str:
    if report.classes is None:
        if report.config.true_classes == "no":
            return "<p>Not asked for (--true_classes no).</p>"
        return (
            "<p>The tars name no true classes: no list of numbers in KEY.json under "
            f"<code>{escape(report.config.classes_key)}</code>, no KEY.cls. So there is no purity here, and no NMI.</p>"
        )
    classes = report.classes
    found, chance = classes.agreement, classes.shuffled
    left_out = f"; {found.left_out:,} without a class or a label left out" if found.left_out else ""
    single = classes.classes_per_image <= 1
    text = (
        "<p><b>Purity</b>: the share of images that have the commonest true class of the cluster they belong to. "
        "<b>NMI</b> (normalised mutual information): what cluster and class tell of each other, 0 for nothing, 1 for "
        f"everything{'' if single else '; an image of several classes counts in part for each'}. Both rise with the number "
        "of clusters even if clusters mean nothing, so compare with the second column: the same images, dealt out at "
        "random to clusters of the same sizes, and judged by the classes that are commonest then.</p>"
        f"<p>{found.images:,} images, {found.num_classes:,} classes, {classes.classes_per_image:.2f} classes an image on "
        f"average{left_out}."
    )
    if classes.commonest:
        text += f" The commonest, {escape(classes.commonest[0])}, is in {_percent(classes.commonest[1])} of the images."
    rows = [
        ("Purity", f"{found.purity:.3f}", f"{chance.purity:.3f}"),
        ("NMI", f"{found.nmi:.3f}", f"{chance.nmi:.3f}"),
    ]
    text += "</p>" + _table(["", "these clusters", "by chance"], rows)
    labels = range(1, len(classes.share_by_label) + 1)
    if len(labels) < 2:
        return text
    by_label = [
        ("has the class", *(_percent(share) for share in classes.share_by_label)),
        ("by chance", *(_percent(share) for share in classes.share_by_chance)),
    ]
    return (
        text
        + f"<h3>Label by label</h3><p>How many of {classes.sampled:,} randomly drawn images have the commonest class of the "
        "cluster of their first, second, ... label. By chance: of another image's label. Labels that come down to chance "
        "add noise. The first column is flattered: the image itself has helped to make that class the commonest.</p>"
        + _table(["label", *(str(label) for label in labels)], by_label)
    )


# ---------------------------------------------------------------------------------------------- pictures


def _clusters(report: Report) -> str:
    explained = {
        "Random clusters": "Drawn among those that images belong to.",
        "Largest clusters": "Those that most images belong to.",
        "Tightest clusters": "The highest mean cosine of their images to the center, "
        f"among clusters of {report.fewest_images} images or more; often copies of one picture.",
        "Loosest clusters": f"The lowest mean cosine, among clusters of {report.fewest_images} images or more.",
    }
    text = (
        "<p>The images with the highest cosine to a center, among those that list it, nearest first. Under each its cosine"
        f"{' and its true classes' if report.classes else ''}.</p>"
    )
    for title, views in report.clusters.items():
        text += f"<h3>{title}</h3><p class='small'>{explained[title]}</p>"
        for view in views:
            text += f"<div><b>Cluster {view.number}</b>: {_about(view)}{_thumbnails(report, view)}</div>"
    return text


def _labelled_images(report: Report) -> str:
    if not report.labelled_images:
        return "<p>None asked for (--images 0).</p>"
    text = (
        "<p>Images drawn at random, and for each of their labels, nearest first, the images nearest to that center (without "
        "the image itself). Good labels show several things that are in the image.</p>"
    )
    for row in report.labelled_images:
        boxes = ""
        for i, view in enumerate(row.labels, start=1):
            majority = "" if view.majority is None else f"<br>{_majority(view)}"
            boxes += (
                f'<div class="label"><b>{i}.</b> cluster {view.number}, cosine {view.cosine:.2f}<br>{_images(view.size)}'
                f"{majority}{_thumbnails(report, view, captions=False)}</div>"
            )
        image = report.images[row.place]
        classes = f"<br>true: {escape(image.classes)}" if image.classes else ""
        caption = f"{escape(image.shard)}.tar, {escape(image.key)}{classes}"
        text += (
            f'<div class="image"><figure>{_picture(image)}<figcaption>{caption}</figcaption></figure>'
            f'<div class="labels">{boxes}</div></div>'
        )
    return text


def _about(view: ClusterView) -> str:
    parts = [f"{_images(view.size)} belong{'s' if view.size == 1 else ''} to it, {view.mentions:,} list it"]
    if view.size:
        parts.append(f"mean cosine {view.mean_cosine:.3f}")
    if view.majority is not None:
        parts.append(_majority(view))
    return ", ".join(parts)


def _majority(view: ClusterView) -> str:
    name, share = view.majority
    return f"commonest: {escape(name)} ({share:.0%})"


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def _thumbnails(report: Report, view: ClusterView, captions: bool = True) -> str:
    figures = ""
    for place, cosine in view.nearest:
        image = report.images[place]
        classes = f"<br>{escape(image.classes)}" if image.classes else ""
        caption = f"<figcaption>{cosine:.2f}{classes}</figcaption>" if captions else ""
        figures += f"<figure>{_picture(image)}{caption}</figure>"
    return f'<div class="row">{figures}</div>' if figures else "<p class='small'>No other image lists it.</p>"


def _picture(image: ImageView) -> str:
    name = escape(f"{image.shard}.tar, {image.key}")
    if image.problem:
        return f'<div class="gone" title="{name}">cannot be shown: {escape(image.problem)}</div>'
    return f'<img src="{image.source}" alt="{name}" title="{name}" loading="lazy">'


# ---------------------------------------------------------------------------------------------- pieces


def _table(heads: Sequence[str], rows: Sequence[tuple]) -> str:
    """First column words, the others numbers where there are heads."""
    kind = ' class="n"' if heads else ""
    head = "".join(f"<th{kind if i else ''}>{name}</th>" for i, name in enumerate(heads))
    body = "".join(
        "<tr>" + f"<th>{row[0]}</th>" + "".join(f"<td{kind}>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return f'<div class="table"><table>{f"<tr>{head}</tr>" if heads else ""}{body}</table></div>'


def _histogram(series: Sequence[Series], x_title: str, y_title: str) -> str:
    """Drawn in bins of 0.005, or of 0.02 where the values spread far."""
    used = np.flatnonzero(np.sum([one.values for one in series], axis=0))
    factor = WIDEST_BINS if len(used) and used[-1] - used[0] > BINS_DRAWN else 1
    drawn = [Series(one.name, coarser(list(one.values), factor)) for one in series]
    return histogram(drawn, -1, 1, x_title, f"% of the {y_title} per {factor * 2 / COSINE_BINS:g}")


def _doubling(largest: int) -> list[tuple[int, int]]:
    """0, 1, 2-3, 4-7 ... up to the one that holds `largest`."""
    ranges, low = [(0, 0)], 1
    while low <= largest:
        ranges.append((low, 2 * low - 1))
        low *= 2
    return ranges


def _short(number: int) -> str:
    """1023 as 1023, 65536 as 66k."""
    for unit, word in ((1_000_000, "M"), (1_000, "k")):
        if number >= 10 * unit:
            return f"{number / unit:.0f}{word}"
    return str(number)


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.1f}%" if percent >= 1 or percent == 0 else f"{percent:.2g}%"


def _quantile(share: np.ndarray, q: float) -> float:
    """Upper edge of the bin in which the share `q` is reached."""
    return (int(np.searchsorted(share.cumsum(), q - 1e-12)) + 1) * (2 / COSINE_BINS) - 1


def _last_name(l: int) -> str:
    return "last label" if l == 1 else f"last label (no. {l})"
