"""Evaluation sets: the protocol against scikit-learn, metrics, kNN, the table of sets, the cache, many ranks."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from data_factory import picture
from ranks import run_ranks
from tiny_vit import TINY

from mlcd_ds.checkpoint import save_encoder
from mlcd_ds.config import KnnConfig, ProbeConfig
from mlcd_ds.data.captions import captions_of
from mlcd_ds.data.tars import write_tar
from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.evaluation import features as features_module
from mlcd_ds.evaluation.datasets import KNOWN_SETS, find_sets
from mlcd_ds.evaluation.features import FeatureCache, load_probed, read_features
from mlcd_ds.evaluation.knn import NearestRows, knn_sets, votes
from mlcd_ds.evaluation.metrics import eleven_point_precision, mean_per_class_recall, roc_auc, top_k_accuracy
from mlcd_ds.evaluation.probe import probe, probe_sets
from mlcd_ds.evaluation.results import read_results
from mlcd_ds.evaluation.sets import raise_failed, shared_out, summary
from mlcd_ds.evaluation.softmax import SoftmaxRegressions
from mlcd_ds.models.vit import VisionTransformer
from mlcd_ds.topology import Topology

CPU = torch.device("cpu")


# --- softmax regression


def softmax_loss(features, classes, weights, biases, value) -> float:
    """The dense definition, in float64."""
    z = features @ weights.T + biases
    z -= z.max(axis=1, keepdims=True)
    log_likelihood = z[np.arange(len(z)), classes] - np.log(np.exp(z).sum(axis=1))
    return -log_likelihood.sum() + value / 2 * (weights**2).sum()


def digits():
    from sklearn.datasets import load_digits

    features, classes = load_digits(return_X_y=True)
    return features.astype(np.float32)[:900], classes[:900], features.astype(np.float32)[900:], classes[900:]


def test_softmax_regression_is_sklearns_on_digits():
    """Weights where there is one solution to speak of; accuracy within 0.1 points of scikit-learn's at every lambda."""
    from sklearn.linear_model import LogisticRegression

    train, train_y, test, test_y = digits()
    lambdas = np.array([1.0, 100.0, 1e4])
    fit = SoftmaxRegressions(train, train_y, 10, CPU).fit(lambdas, 1000, 1e-9)
    assert fit.converged.all()
    for p, value in enumerate(lambdas):
        oracle = LogisticRegression(C=1 / value, solver="newton-cg", tol=1e-8, max_iter=1000)
        oracle.fit(train.astype(np.float64), train_y)
        np.testing.assert_allclose(fit.weights[p], oracle.coef_, atol=2e-4 * np.abs(oracle.coef_).max())
        own = (fit.scores(test, p).argmax(1) == test_y).mean()
        assert abs(own - oracle.score(test.astype(np.float64), test_y)) <= 0.001
        assert softmax_loss(train, train_y, fit.weights[p], fit.biases[p], value) <= softmax_loss(
            train, train_y, oracle.coef_, oracle.intercept_, value
        ) * (1 + 1e-9)


def test_separable_classes_are_solved_for_the_smallest_lambda():
    train, train_y, *_ = digits()
    fit = SoftmaxRegressions(train, train_y, 10, CPU).fit(np.array([1e-6, 1e-2]), 1000, 1e-4)
    assert fit.converged.all() and (fit.iterations < 400).all()
    assert (fit.scores(train, 0).argmax(1) == train_y).all()


def test_softmax_problems_do_not_see_each_other_and_small_pieces_give_the_same(monkeypatch):
    generator = np.random.default_rng(0)
    features, classes = generator.normal(size=(150, 6)), generator.integers(0, 4, 150)
    regressions = SoftmaxRegressions(features, classes, 4, CPU)
    together = regressions.fit(np.array([1e-3, 1.0, 1e3]), 1000, 1e-9)
    monkeypatch.setattr("mlcd_ds.evaluation.softmax.WORKSPACE_NUMBERS", 50)
    monkeypatch.setattr("mlcd_ds.evaluation.logistic.ROWS_AT_A_TIME", 40)
    alone = SoftmaxRegressions(features, classes, 4, CPU).fit(np.array([1.0]), 1000, 1e-9)
    np.testing.assert_allclose(together.weights[1], alone.weights[0], rtol=1e-6, atol=1e-9)
    unfinished = regressions.fit(np.array([1e-3]), 2, 1e-9)
    assert not unfinished.converged[0] and unfinished.iterations[0] == 2


# --- metrics


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_sklearns(seed):
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score, top_k_accuracy_score

    generator = np.random.default_rng(seed)
    truth, scores = generator.random(200) < 0.3, np.round(generator.normal(size=200), seed)
    assert roc_auc(truth, scores) == pytest.approx(roc_auc_score(truth, scores))
    classes, scores = generator.integers(0, 7, 200), generator.normal(size=(200, 7))
    assert top_k_accuracy(classes, scores, 5) == pytest.approx(top_k_accuracy_score(classes, scores, k=5))
    predicted = scores.argmax(1)
    assert top_k_accuracy(classes, scores, 1) == (predicted == classes).mean()
    assert mean_per_class_recall(classes, predicted) == pytest.approx(balanced_accuracy_score(classes, predicted))


def eleven_points_by_definition(truth, scores) -> float:
    found = []
    for level in range(11):
        best = 0.0
        for threshold in np.unique(scores):
            taken = scores >= threshold
            if truth[taken].sum() * 10 >= level * truth.sum():
                best = max(best, truth[taken].mean())
        found.append(best)
    return float(np.mean(found))


def test_eleven_point_precision():
    generator = np.random.default_rng(0)
    for digits_ in (0, 1, 9):
        truth, scores = generator.random(60) < 0.2, np.round(generator.normal(size=60), digits_)
        assert eleven_point_precision(truth, scores) == pytest.approx(eleven_points_by_definition(truth, scores))
    ten = np.repeat([True, False], 10)
    assert eleven_point_precision(ten, -np.arange(20.0)) == 1.0
    assert np.isnan(eleven_point_precision(np.zeros(3, bool), np.arange(3.0)))
    assert np.isnan(roc_auc(np.zeros(3, bool), np.arange(3.0)))


def test_ties_and_classes_that_have_no_score():
    assert top_k_accuracy(np.array([0, 1]), np.zeros((2, 3)), 1) == 0.5
    assert top_k_accuracy(np.array([2, 0]), np.array([[1.0, 0.5, -np.inf], [1.0, 0.5, -np.inf]]), 2) == 0.5


# --- nearest neighbours


def dense_knn(train, classes, test, names, k, temperature):
    """The definition, in float64: all cosines, all votes."""
    train, test = (
        x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (train, test)
    )
    share = np.zeros((len(test), len(names)))
    for i, cosines in enumerate(test @ train.T):
        for row in np.argsort(-cosines, kind="stable")[:k]:
            for name in classes[row]:
                share[i, names.index(name)] += np.exp(cosines[row] / temperature)
        share[i] /= np.exp(np.sort(cosines)[::-1][:k] / temperature).sum()
    return share


@pytest.mark.parametrize("k, block", [(1, 7), (5, 16), (50, 1000), (300, 9)])
def test_knn_is_the_dense_definition(k, block):
    generator = np.random.default_rng(k)
    train, test = (
        generator.normal(size=(120, 12)).astype(np.float32),
        generator.normal(size=(30, 12)).astype(np.float32),
    )
    train[60:70] = train[:10]  # equal neighbours
    classes = [tuple(sorted({int(c) for c in generator.integers(0, 6, generator.integers(0, 4))})) for _ in train]
    search = NearestRows(test, k, CPU, block)
    for part in np.array_split(train, 3):
        search.add(part)
    cosines, rows = search.found()
    assert cosines.shape == (30, min(k, 120))
    names = list(range(6))
    expected = dense_knn(train, classes, test, names, k, 0.07)
    np.testing.assert_allclose(votes(cosines, rows, classes, names, 0.07), expected, atol=2e-5)


def test_knn_refuses_features_without_direction():
    with pytest.raises(DataError, match="1 training features are all zeros"):
        NearestRows(np.ones((2, 3), np.float32), 1, CPU, 8).add(np.zeros((1, 3), np.float32))
    with pytest.raises(DataError, match="4 dimensions, test features 3"):
        NearestRows(np.ones((2, 3), np.float32), 1, CPU, 8).add(np.ones((1, 4), np.float32))


# --- sets, cache, ranks


def write_set(folder: Path, split: str, count: int, classes: int, shards: int = 2, multilabel: bool = False) -> None:
    """CLIP_benchmark's layout; the class is the colour."""
    for shard in range(shards):
        samples = []
        for i in range(shard, count, shards):
            name, truth = ("npy", io.BytesIO()) if multilabel else ("cls", None)
            if multilabel:
                np.save(truth, np.eye(classes, dtype=np.int64)[i % classes] | np.eye(classes, dtype=np.int64)[0])
            data = truth.getvalue() if multilabel else str(i % classes).encode()
            samples.append((f"s{i:07d}", {"png": picture(i % classes * 7 + i % 2, 20), name: data}))
        write_tar(folder / split / f"{shard}.tar", samples)
    (folder / split / "nshards.txt").write_text(f"{shards}\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """sets/ with cifar10 (with val/), wds_vtab-pets, voc2007_multilabel, hateful_memes and mine; run/ with an encoder."""
    base = tmp_path_factory.mktemp("evaluation")
    for name, classes in (("cifar10", 6), ("wds_vtab-pets", 3), ("hateful_memes", 2), ("mine", 3)):
        write_set(base / "sets" / name, "train", 36, classes)
        write_set(base / "sets" / name, "test", 18, classes, shards=1)
    write_set(base / "sets/cifar10", "val", 12, 6, shards=1)
    write_set(base / "sets/voc2007_multilabel", "train", 36, 4, multilabel=True)
    write_set(base / "sets/voc2007_multilabel", "test", 18, 4, multilabel=True)
    (base / "sets/voc2007_multilabel/dataset_type.txt").write_text("multilabel\n")
    save_encoder(
        base / "run/checkpoints/step_000000001/encoder", "tiny", TINY, VisionTransformer(TINY, seed=3).state_dict()
    )
    return base


def flags(root: Path, **more) -> dict:
    return {"model": f"run:{root / 'run'}", "root": str(root / "sets"), "lambda_halvings": 1, **more}


def test_the_table_has_clips_27_sets():
    assert len(KNOWN_SETS) == 27 and sum(known.slug is not None for known in KNOWN_SETS.values()) == 22
    by_metric = {
        metric: {known.name for known in KNOWN_SETS.values() if known.metric == metric}
        for metric in {known.metric for known in KNOWN_SETS.values()} - {"accuracy"}
    }
    assert by_metric == {
        "mean_per_class": {"fgvc_aircraft", "pets", "caltech101", "flowers"},
        "11_point_mean_average_precision": {"voc2007"},
        "top1_top5": {"kinetics700"},
        "roc_auc": {"hateful_memes"},
    }


def test_all_sets_by_name_missing_ones_told_and_the_same_on_two_ranks(root, tmp_path):
    alone = probe_sets(ProbeConfig(**flags(root, output_dir=str(tmp_path / "one"))), Topology.single())
    assert list(alone.results) == ["cifar10", "voc2007", "pets", "hateful_memes"]  # the table's order
    assert len(alone.missing) == 23 and "imagenet1k" in alone.missing and not alone.failed
    shown = {name: result.main_metric for name, result in alone.results.items()}
    assert shown == {
        "cifar10": "lp_acc1",
        "voc2007": "lp_11_point_mean_average_precision",
        "pets": "lp_mean_per_class_recall",
        "hateful_memes": "lp_roc_auc",
    }
    cifar, pets = alone.results["cifar10"], alone.results["pets"]
    assert cifar.score > 0.9 and pets.score > 0.9  # the classes are colours
    assert (cifar.dataset, cifar.model, cifar.pretrained) == ("wds/vtab/cifar10", "tiny", f"run:{root / 'run'}")
    assert cifar.metrics["lp_acc5"] is not None and pets.metrics["lp_acc5"] != pets.metrics["lp_acc5"]  # NaN: 3 classes
    assert (cifar.details["validation"], cifar.details["n_validation"], cifar.details["n_train"]) == ("val/", 12, 36)
    assert cifar.details["classes_in_clips_table"] == 10 and cifar.details["num_classes"] == 6
    text = summary(alone)
    assert (
        text.startswith("mean over cifar10, voc2007, pets, hateful_memes (4): ") and "missing, in no mean (23)" in text
    )
    assert len(read_results(tmp_path / "one")) == 4

    config = ProbeConfig(**flags(root, output_dir=str(tmp_path / "two"), cache=str(tmp_path / "cache")))
    for evaluated in run_ranks(2, lambda topology: probe_sets(config, topology)):
        assert list(evaluated.results) == list(alone.results)
        for name, result in evaluated.results.items():
            np.testing.assert_equal(result.metrics, alone.results[name].metrics)
            assert result.details["lambda"] == alone.results[name].details["lambda"]
    with pytest.raises(ConfigError, match="2 ranks share features through files: give --cache"):
        run_ranks(2, lambda topology: probe_sets(ProbeConfig(**flags(root)), topology))
    again = probe_sets(config, Topology.single())
    assert again.kept == list(alone.results)
    anew = config.model_copy(update={"overwrite": True, "datasets": "cifar10"})
    assert list((found := probe_sets(anew, Topology.single())).results) == ["cifar10"] and not found.kept
    (tmp_path / "other").mkdir()
    (tmp_path / "other/cifar10").symlink_to(root / "sets/cifar10")
    other = config.model_copy(update={"root": str(tmp_path / "other")})
    assert not probe_sets(other, Topology.single()).kept  # of another folder, though older than the result


def test_a_set_that_is_broken_leaves_the_others_and_is_told(root, tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    for name in ("cifar10", "mine"):
        (folder / name).symlink_to(root / "sets" / name)
    write_set(folder / "stl10", "train", 12, 3)
    write_set(folder / "stl10", "test", 6, 3)
    (folder / "stl10/train/0.tar").write_bytes(b"no tar" * 100)
    settings = flags(root) | {"root": str(folder)}
    settings |= {"datasets": "stl10,mine,gtsrb", "cache": str(tmp_path / "cache")}
    evaluated = probe_sets(ProbeConfig(**settings), Topology.single())
    assert list(evaluated.results) == ["mine"] and evaluated.missing == ["gtsrb"]
    with pytest.raises(DataError, match=r"1 set\(s\) could not be evaluated.*stl10: .*not a tar"):
        raise_failed(evaluated)
    assert evaluated.results["mine"].dataset == "mine"  # a folder of the user's own


def test_what_is_refused(root, tmp_path):
    with pytest.raises(ConfigError, match=r"'cifar1' is none of the 27 known sets.*Did you mean cifar10"):
        find_sets(str(root / "sets"), "cifar1")
    with pytest.raises(DataError, match="is no folder"):
        find_sets(str(root / "nowhere"), "all")
    with pytest.raises(DataError, match="none of the sets 'mnist' lies below"):
        probe_sets(ProbeConfig(**flags(root, datasets="mnist")), Topology.single())
    with pytest.raises(ConfigError, match="no images"):
        probe_sets(ProbeConfig(model="run:x"), Topology.single())
    for bad, message in (
        ({"output": "x.json"}, "give --output_dir"),
        ({"train_shards": "x"}, "both name images"),
        ({"model": "features:a+b"}, "goes with --train_shards"),
    ):
        with pytest.raises(ValueError, match=message):
            ProbeConfig(**flags(root) | bad)
    write_set(tmp_path / "mnist", "train", 6, 3)
    write_set(tmp_path / "mnist", "test", 6, 3)
    (tmp_path / "mnist/test/1.tar").unlink()
    with pytest.raises(DataError, match=r"lacks 1 of the 2 tars that its nshards.txt counts, e.g. 1\.tar"):
        find_sets(str(tmp_path), "mnist")
    (tmp_path / "mnist/test/nshards.txt").write_text("1\n")
    (tmp_path / "wds_mnist").symlink_to(tmp_path / "mnist")
    with pytest.raises(DataError, match="more than once"):
        find_sets(str(tmp_path), "mnist")
    voc = flags(root, datasets="voc2007", metric="accuracy")
    evaluated = probe_sets(ProbeConfig(**voc), Topology.single())
    assert "wants one class an image, but 40 of 54 images have none or several" in evaluated.failed["voc2007"]


def test_a_set_named_by_its_folder_or_slug_is_the_same_set(root, tmp_path):
    for name in ("wds_vtab-pets", "wds/vtab/pets", "vtab/pets"):
        ((found,), _) = find_sets(str(root / "sets"), name)
        assert (found.name, found.metric, found.result_name) == ("pets", "mean_per_class", "wds/vtab/pets")
    for name in ("voc2007", "voc2007_multilabel"):
        ((found,), _) = find_sets(str(root / "sets"), name)
        assert (found.name, found.metric) == ("voc2007", "11_point_mean_average_precision")
    with pytest.raises(ConfigError, match="expected all, or different names"):
        find_sets(str(root / "sets"), "pets,wds_vtab-pets")
    # CLIP_benchmark's own voc2007 has crops of one class each.
    for name in ("voc2007", "wds_voc2007", "wds_vtab-svhn"):
        (tmp_path / name).symlink_to(root / "sets/mine")
    with pytest.raises(DataError, match="voc2007 of the 27 is CLIP_benchmark's voc2007_multilabel.*wds_voc2007"):
        find_sets(str(tmp_path), "voc2007")
    (tmp_path / "voc2007").unlink()
    (crops, svhn), missing = find_sets(str(tmp_path), "wds_voc2007,svhn,flickr8k")
    assert (crops.metric, crops.result_name) == (None, "wds/voc2007") and missing == ["flickr8k"]
    assert (svhn.metric, svhn.result_name) == (None, "wds/vtab/svhn")
    found = probe_sets(ProbeConfig(**flags(root) | {"root": str(tmp_path), "datasets": "svhn"}), Topology.single())
    assert (
        found.results["svhn"].main_metric == "lp_acc1" and "classes_in_clips_table" not in found.results["svhn"].details
    )


def test_knn_on_sets(root, tmp_path):
    settings = flags(root, datasets="cifar10,voc2007", k="3,10,200", block_rows=8)
    del settings["lambda_halvings"]
    alone = knn_sets(KnnConfig(**settings), Topology.single())
    cifar = alone.results["cifar10"]
    assert cifar.main_metric == "knn3_acc1" and cifar.score > 0.9
    assert cifar.details["n_train"] == 48 and cifar.details["k_above_n"] == [200]  # train + val
    assert alone.results["voc2007"].main_metric == "knn3_mean_average_precision"
    config = KnnConfig(**settings | {"cache": str(tmp_path / "cache"), "block_rows": 1000})
    for evaluated in run_ranks(2, lambda topology: knn_sets(config, topology)):
        np.testing.assert_equal(evaluated.results["cifar10"].metrics, cifar.metrics)
    with pytest.raises(ConfigError, match=r"--k '10,x': expected whole numbers above 0"):
        knn_sets(KnnConfig(**settings | {"k": "10,x"}), Topology.single())


def test_tars_from_a_pipe_need_leave(root, tmp_path):
    """As in training: refused, and a word how to allow it."""

    def knn(prefix, **more):
        places = {f"{part}_shards": f"{prefix}{root}/sets/mine/{part}/0.tar" for part in ("train", "test")}
        return knn_sets(
            KnnConfig(model=f"run:{root / 'run'}", k="3", dataset_name="mine", **places, **more), Topology.single()
        )

    cache = {"shard_cache": str(tmp_path / "tars")}
    with pytest.raises(DataError, match="'pipe:' would run a shell command and is refused.*--allow_pipe"):
        knn("pipe:cat ", **cache)
    assert not (tmp_path / "tars").exists()
    piped = knn("pipe:cat ", **cache, allow_pipe=True).results["mine"]
    np.testing.assert_equal(piped.metrics, knn("").results["mine"].metrics)
    spec = f"pipe:cat {root}/sets/mine/test/0.tar"
    with pytest.raises(DataError, match="is refused.*--allow_pipe"):
        next(captions_of([spec], str(tmp_path / "tars")))
    assert list(captions_of([spec], str(tmp_path / "tars"), allow_pipe=True)) == []


def test_features_are_made_once_and_found_by_their_hashes(root, tmp_path, monkeypatch):
    made = []
    original = features_module.batches_of_images
    monkeypatch.setattr(features_module, "batches_of_images", lambda *a: made.append(1) or original(*a))
    shards = {"train_shards": str(root / "sets/mine/train/*.tar"), "test_shards": str(root / "sets/mine/test/*.tar")}
    config = ProbeConfig(model=f"run:{root / 'run'}", cache=str(tmp_path / "cache"), **shards)
    first = read_features(config, "train", CPU)
    assert len(made) == 2
    second = read_features(config, "train", CPU)
    assert len(made) == 2
    np.testing.assert_array_equal(first.features, second.features)
    assert first.classes == second.classes

    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for name in ("0.tar", "1.tar"):
        (copy / name).write_bytes((root / "sets/mine/train" / name).read_bytes())
    moved = config.model_copy(update={"train_shards": f"{copy}/*.tar"})
    read_features(moved, "train", CPU)
    assert len(made) == 2  # the same bytes in another place
    samples = [("x", {"png": picture(1, 20), "cls": b"1"})]
    write_tar(copy / "0.tar", samples)
    assert len(read_features(moved, "train", CPU).classes) == 19
    assert len(made) == 3
    read_features(config.model_copy(update={"precision": "bfloat16"}), "test", CPU)
    read_features(config.model_copy(update={"model": f"untrained:{root / 'run'}"}), "test", CPU)
    read_features(config, "test", CPU)
    assert len(made) == 6  # other products, other weights, another tar

    cache = FeatureCache.of(config, load_probed(config, CPU))
    damaged = cache.file(root / "sets/mine/test/0.tar")
    damaged.write_bytes(damaged.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cached features .*0-.*npz are damaged .*: remove that file"):
        read_features(config, "test", CPU)
    note = next(iter((tmp_path / "cache/hashes").iterdir()))
    note.write_text("{")
    read_features(config, "train", CPU)


def test_one_class_problems_of_two_classes_are_sklearns_logistic_regression(tmp_path):
    """Through features that are stored: the whole path at one lambda."""
    from sklearn.linear_model import LogisticRegression

    train, train_y, test, test_y = digits()
    for split, features, classes in (("train", train, train_y), ("test", test, test_y)):
        kept = classes < 2
        write_stored(tmp_path, split, features[kept], classes[kept])
    settings = {"train_shards": f"{tmp_path}/train.tar", "test_shards": f"{tmp_path}/test.tar", "lambda_coarse": 1}
    settings |= {"model": f"features:{tmp_path / 'train'}+{tmp_path / 'test'}", "lambda_min": 1e3}
    found = probe(ProbeConfig(**settings, dataset_name="digits"), CPU)
    assert found.main_metric == "lp_acc1" and found.details["lambda"] == pytest.approx(1e3)
    oracle = LogisticRegression(C=1e-3).fit(train[train_y < 2], train_y[train_y < 2])
    assert found.score == pytest.approx(oracle.score(test[test_y < 2], test_y[test_y < 2]))
    assert (found.dataset, found.metrics["lp_acc5"]) == ("digits", pytest.approx(np.nan, nan_ok=True))


def write_stored(folder: Path, split: str, features: np.ndarray, classes: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = [f"{i:06d}" for i in range(len(classes))]
    write_tar(
        folder / f"{split}.tar",
        [(k, {"png": b"x", "cls": str(c).encode()}) for k, c in zip(keys, classes, strict=True)],
    )
    for name in ("img_emb", "metadata"):
        (folder / split / name).mkdir(parents=True)
    np.save(folder / split / f"img_emb/img_emb_{split}.npy", features.astype(np.float16))
    pq.write_table(pa.table({"key": keys}), folder / split / f"metadata/metadata_{split}.parquet")


def test_sharing_out():
    assert shared_out({"a": 5, "b": 3, "c": 3, "d": 1}, 2) == [["a", "d"], ["b", "c"]]
    assert shared_out({}, 3) == [[], [], []]
