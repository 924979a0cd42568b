"""The linear probe: its mathematics against scikit-learn, its command line on a tiny run, its refusals."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_factory import picture
from tiny_clip import write_tiny_clip
from tiny_vit import TINY

from mlcd_ds.checkpoint import save_encoder
from mlcd_ds.config import ProbeConfig
from mlcd_ds.data.tars import write_tar
from mlcd_ds.errors import CheckpointError, ConfigError, DataError
from mlcd_ds.evaluation.features import read_features
from mlcd_ds.evaluation.logistic import LogisticRegressions
from mlcd_ds.evaluation.metrics import average_precision, average_precisions
from mlcd_ds.evaluation.probe import OneClass, probe, search
from mlcd_ds.evaluation.results import Result
from mlcd_ds.evaluation.sets import Evaluated, summary
from mlcd_ds.models.vit import VisionTransformer
from mlcd_ds.topology import Topology

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


# --- mathematics


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_sklearns(seed):
    from sklearn.metrics import average_precision_score

    generator = np.random.default_rng(seed)
    truth, scores = generator.random((200, 6)) < 0.2, generator.normal(size=(200, 6))
    scores[:, 3:] = np.round(scores[:, 3:])  # many ties
    scores[:, 5] = 1.0
    expected = [average_precision_score(truth[:, c], scores[:, c]) for c in range(6)]
    np.testing.assert_allclose(average_precisions(truth, scores), expected, rtol=1e-12)
    assert average_precisions(truth, scores).mean() == pytest.approx(
        average_precision_score(truth, scores, average="macro")
    )


def test_average_precision_by_hand():
    assert average_precision(np.array([True, False, True]), np.array([3.0, 2.0, 1.0])) == pytest.approx((1 + 2 / 3) / 2)
    assert np.isnan(average_precision(np.zeros(3, bool), np.arange(3.0)))


def mixed_features(n: int, d: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlated features away from the origin, and noisy classes."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(n, d)) @ generator.normal(size=(d, d)) + 3
    return features, features @ generator.normal(size=(d, classes)) * 0.1 + generator.normal(size=(n, classes)) > 0.5


@pytest.mark.parametrize("n, d", [(400, 30), (40, 60)])  # the second: more features than images
def test_equal_to_sklearn_at_the_same_lambda(n, d):
    from sklearn.linear_model import LogisticRegression

    features, truth = mixed_features(n, d, 3, seed=n)
    lambdas = np.array([1e-3, 1.0, 100.0, 1e6])
    class_of, lambda_of = np.repeat(np.arange(3), 4), np.tile(lambdas, 3)
    fit = LogisticRegressions(features).fit(truth, class_of, lambda_of, 5000, 1e-12)
    assert fit.converged.all()
    for p, (c, value) in enumerate(zip(class_of, lambda_of, strict=True)):
        oracle = LogisticRegression(C=1 / value, solver="newton-cholesky", tol=1e-12, max_iter=1000)
        oracle.fit(features, truth[:, c])
        np.testing.assert_allclose(fit.weights[p], oracle.coef_[0], rtol=1e-5, atol=1e-6 * np.abs(oracle.coef_).max())
        assert fit.biases[p] == pytest.approx(oracle.intercept_[0], rel=1e-5, abs=1e-6)
        np.testing.assert_allclose(
            fit.scores(features[:5])[:, p], oracle.decision_function(features[:5]), rtol=1e-5, atol=1e-6
        )


def test_the_gradient_vanishes_by_the_dense_definition():
    features, truth = mixed_features(300, 20, 2, seed=1)
    fit = LogisticRegressions(features).fit(truth, np.array([0, 1]), np.array([0.1, 10.0]), 1000, 1e-10)
    residual = 1 / (1 + np.exp(-fit.scores(features))) - truth
    gradient = residual.T @ features + np.array([[0.1], [10.0]]) * fit.weights
    assert np.abs(gradient).max() < 1e-6 and np.abs(residual.sum(0)).max() < 1e-6


def test_problems_do_not_see_each_other():
    features, truth = mixed_features(200, 10, 3, seed=2)
    regressions = LogisticRegressions(features)
    together = regressions.fit(truth, np.array([0, 1, 2]), np.array([1e-4, 1.0, 1e4]), 1000, 1e-9)
    alone = regressions.fit(truth, np.array([1]), np.array([1.0]), 1000, 1e-9)
    np.testing.assert_allclose(together.weights[1], alone.weights[0], rtol=1e-6)


def test_classes_without_a_solution_score_equally_and_an_unfinished_one_is_told():
    features, truth = mixed_features(200, 10, 3, seed=3)
    truth[:, 0], truth[:, 2] = False, True
    fit = LogisticRegressions(features).fit(truth, np.arange(3), np.full(3, 1e-3), 2, 1e-9)
    assert not fit.weights[[0, 2]].any() and fit.weights[1].any()
    assert fit.converged.tolist() == [True, False, True] and fit.iterations.tolist() == [0, 2, 0]


def test_search_grows_finer_round_the_best():
    tried = []

    def evaluate(values):
        tried.append(values)
        return [-abs(np.log10(value) - 1.13) for value in values]

    best, scores = search(evaluate, 1e-6, 1e6, 7, 4)
    assert np.allclose(np.log10(tried[0]), np.arange(-6, 7, 2)) and [len(values) for values in tried] == [7, 2, 2, 2, 2]
    assert np.log10(best) == pytest.approx(1.125) and len(scores) == 15  # the nearest of CLIP's 8 steps a decade
    assert search(lambda values: [0.0] * len(values), 1e-6, 1e6, 7, 0)[0] == pytest.approx(1e6)


def test_the_defaults_are_clips_protocol():
    """At most 1000 iterations; from 7 values of lambda down to the grid of 96, by halving."""
    config = ProbeConfig(model="x")
    assert config.max_iterations == 1000
    tried = []

    def evaluate(values):
        tried.extend(values)
        return [-abs(math.log10(value) + 4.9) for value in values]

    search(evaluate, config.lambda_min, config.lambda_max, config.lambda_coarse, config.lambda_halvings)
    grid = np.linspace(-6, 6, 97)  # 96 steps, 8 a decade
    steps = (np.log10(tried) + 6) * 8
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-9)
    assert len(tried) == 15 and np.allclose(np.log10(tried[:7]), grid[::16])
    assert np.diff(np.sort(np.round(steps))).min() == 1  # the last halving


@pytest.mark.parametrize(("metric", "words"), [("roc_auc", "both classes"), ("top1_top5", "five classes, there are 2")])
def test_a_validation_part_without_a_score_chooses_no_lambda(metric, words):
    generator = np.random.default_rng(0)
    fitted, held = [(i % 2,) for i in range(40)], [(1,) for _ in range(10)]
    problem = OneClass(metric, [fitted, held, fitted], ProbeConfig(model="x"), CPU)
    with pytest.raises(DataError, match=f"the 10 validation images have no .*{words}.*no lambda can be chosen"):
        problem.choose_lambda(generator.normal(size=(50, 3)), np.arange(40), np.arange(40, 50))


def test_a_set_without_a_figure_is_in_no_mean_and_told():
    found = [Result(name, "vit", "run:a", "linear_probe", {"lp_roc_auc": score}) for name, score in
             (("one", 0.5), ("two", math.nan))]  # fmt: skip
    text = summary(Evaluated({result.dataset: result for result in found}, [], [], {}))
    assert text == "mean over one (1): 0.5000\nwithout a figure, in no mean (1): two (lp_roc_auc)"


# --- from tars to a result


def mAP(result) -> float:
    return result.metrics["lp_mean_average_precision"]


def write_shards(folder: Path, split: str, count: int, classes=lambda i: [i % 3], broken: int = 0) -> str:
    """Pictures of which class c is mostly of colour c."""
    samples = []
    for i in range(count):
        members = {"jpg": b"no image" if i < broken else picture(classes(i)[0] * 7 + i % 2 if classes(i) else 99, 20)}
        members["json"] = json.dumps({"classes": classes(i)}).encode()
        samples.append((f"{i:09d}", members))
    for shard, part in enumerate((samples[: count // 2], samples[count // 2 :])):
        write_tar(folder / split / f"0000{shard}.tar", part)
    return str(folder / split / "*.tar")


@pytest.fixture
def tiny(tmp_path) -> dict:
    """Flags of a probe of a tiny run folder."""
    model = VisionTransformer(TINY, seed=3)
    save_encoder(tmp_path / "run/checkpoints/step_000000001/encoder", "tiny", TINY, model.state_dict())
    return {
        "model": f"run:{tmp_path / 'run'}",
        "train_shards": write_shards(tmp_path, "train", 60),
        "test_shards": write_shards(tmp_path, "test", 20),
        "metric": "mean_average_precision",  # its classes exclude each other, which would be accuracy
        "batch_size": 16,
    }


def test_features_are_those_before_the_projection_in_tar_order(tiny):
    from mlcd_ds.data.decode import decode_image
    from mlcd_ds.data.tars import expand_shards, read_samples
    from mlcd_ds.data.transforms import resize_shorter_and_center_crop

    found = read_features(ProbeConfig(**tiny), "train", CPU)
    pixels = [
        resize_shorter_and_center_crop(decode_image(members["jpg"], 10**6, 16), 16)
        for shard in expand_shards(tiny["train_shards"])
        for _, members in read_samples(shard)
    ]
    with torch.inference_mode():
        expected = (
            VisionTransformer(TINY, seed=3)
            .eval()
            .forward_features(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))
        )
    np.testing.assert_allclose(found.features, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert found.classes == [(i % 3,) for i in range(60)]


def test_trained_untrained_and_stored_features(tiny, tmp_path):
    run = probe(ProbeConfig(**tiny), CPU)
    assert mAP(run) > 0.9  # the classes are colours
    assert tuple(run.details[name] for name in ("n_train", "n_test", "feature_dim")) == (60, 20, 16)
    twin = probe(ProbeConfig(**tiny | {"model": tiny["model"].replace("run:", "untrained:"), "seed": 3}), CPU)
    assert mAP(twin) == pytest.approx(mAP(run))  # the "trained" weights are initial ones of seed 3
    for split in ("train", "test"):  # stored in another order than the tars': joined by key
        found = read_features(ProbeConfig(**tiny), split, CPU)
        keys = [f"{i:09d}" for i in range(len(found.classes))]
        for shard, rows in enumerate(np.array_split(np.arange(len(keys)), 2)):
            folder = tmp_path / "features" / split
            for name in ("img_emb", "metadata"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            np.save(folder / f"img_emb/img_emb_0000{shard}.npy", found.features[rows[::-1]].astype(np.float16))
            table = pa.table({"key": [keys[row] for row in rows[::-1]]})
            pq.write_table(table, folder / f"metadata/metadata_0000{shard}.parquet")
    spec = f"features:{tmp_path / 'features/train'}+{tmp_path / 'features/test'}"
    stored = probe(ProbeConfig(**tiny | {"model": spec}), CPU)
    assert mAP(stored) == pytest.approx(mAP(run), abs=0.02)
    # and a folder that lacks keys
    table = pq.read_table(folder / "metadata/metadata_00000.parquet").to_pydict()
    pq.write_table(pa.table({"key": ["x", *table["key"][1:]]}), folder / "metadata/metadata_00000.parquet")
    with pytest.raises(DataError, match=r"1 of 20 test images cannot be used \(1 without a feature\)"):
        probe(ProbeConfig(**tiny | {"model": spec}), CPU)
    assert probe(ProbeConfig(**tiny | {"model": spec, "max_skipped_fraction": 0.1}), CPU).details["skipped"][
        "test"
    ] == {"without a feature": 1}


def test_a_clip_and_a_patch_dictionary_can_be_probed(tiny, tmp_path):
    """hf: gives the features before the projection, builtin: those that the extractor gives."""
    from mlcd_ds.clustering.features import extract_features
    from mlcd_ds.config import FeaturesConfig

    write_tiny_clip(tmp_path / "clip")
    folder = tmp_path / "f"
    settings = {"dictionary_size": 16, "patch_features": 12, "images_to_fit": 40, "patches_to_fit": 500}
    extract_features(FeaturesConfig(shards=tiny["train_shards"], output_dir=str(folder), **settings), Topology.single())
    for model, dim in ((f"hf:{tmp_path / 'clip'}", 16), (f"builtin:{folder / 'patches.npz'}", 12)):
        found = read_features(ProbeConfig(**tiny | {"model": model}), "train", CPU)
        assert found.features.shape == (60, dim), model
        assert np.isfinite(found.features).all()
        result = probe(ProbeConfig(**tiny | {"model": model}), CPU)
        assert result.pretrained == model
        assert mAP(result) > 0.6, model  # the classes are colours; chance is 0.33
    stored = np.concatenate([np.load(file) for file in sorted((folder / "img_emb").glob("*.npy"))])
    np.testing.assert_allclose(found.features, stored, atol=2e-3)


def test_classes_missing_on_one_side_are_stated(tiny, tmp_path):
    tiny |= {"test_shards": write_shards(tmp_path, "test", 20, lambda i: [i % 2] if i else [7])}
    found = probe(ProbeConfig(**tiny), CPU)
    result = found.details
    assert result["classes_without_test_image"] == [2] and result["per_class_AP"]["2"] is None
    assert result["classes_without_train_image"] == [7] and result["per_class_AP"]["7"] == pytest.approx(1 / 20)
    known = [ap for ap in result["per_class_AP"].values() if ap is not None]
    assert len(known) == 3 and mAP(found) == pytest.approx(np.mean(known))


def test_broken_images_are_counted_and_too_many_are_fatal(tiny, tmp_path):
    tiny |= {"train_shards": write_shards(tmp_path, "train", 60, broken=3)}
    with pytest.raises(
        DataError, match=r"3 of 60 train images cannot be used \(3 not_an_image\).*max_skipped_fraction 0.01"
    ):
        probe(ProbeConfig(**tiny), CPU)
    result = probe(ProbeConfig(**tiny | {"max_skipped_fraction": 0.1}), CPU)
    assert result.details["n_train"] == 57 and result.details["skipped"]["train"] == {"not_an_image": 3}


def test_class_files_and_wrong_classes(tiny, tmp_path):
    def shards(name, **members):
        write_tar(tmp_path / name / "00000.tar", [("a", {"jpg": picture(0, 20), **members})])
        return ProbeConfig(**tiny | {"train_shards": str(tmp_path / name / "*.tar")})

    assert read_features(shards("cls", cls=b"5"), "train", CPU).classes == [(5,)]
    with pytest.raises(DataError, match=r"00000\.tar: image a has no true classes.*a\.json under 'classes'.*a\.cls"):
        read_features(shards("none", json=b"{}"), "train", CPU)
    for bad in (b'{"classes": 3}', b'{"classes": [-1]}', b'{"classes": ["cat"]}', b"{"):
        with pytest.raises(DataError, match=r"the true classes of a "):
            read_features(shards("bad", json=bad), "train", CPU)


@pytest.mark.parametrize(
    "model, error, message",
    [
        ("runs:x", ConfigError, r"--model 'runs:x': expected run:PATH"),
        ("features:x", ConfigError, "two folders are wanted"),
        ("features:x+y", DataError, "x holds no features"),
        ("run:/nowhere", CheckpointError, "/nowhere holds no encoder"),
    ],
)
def test_wrong_models(tiny, model, error, message):
    with pytest.raises(error, match=message):
        probe(ProbeConfig(**tiny | {"model": model}), CPU)


def test_the_door_writes_a_result_keeps_it_and_the_table_shows_it(tiny, tmp_path):
    def door(name, *arguments):
        command = [sys.executable, str(ROOT / "tools" / name), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)

    flags = [f"--{name}={value}" for name, value in tiny.items()]
    first = door("linear_probe.py", *flags, "--output", "out/probe.json")
    assert first.returncode == 0, first.stderr
    result = json.loads((tmp_path / "out/probe.json").read_text())
    score = result["metrics"]["lp_mean_average_precision"]
    assert (
        f"mean_average_precision {score:.4f} on 20 test images" in first.stdout and len(first.stdout.splitlines()) == 1
    )
    again = door("linear_probe.py", *flags, "--output", "out/probe.json")
    assert "kept" in again.stdout
    newer = (tmp_path / "out/probe.json").stat().st_mtime + 10
    os.utime(tmp_path / "run/checkpoints/step_000000001/encoder/encoder.safetensors", (newer, newer))
    assert "kept" not in door("linear_probe.py", *flags, "--output", "out/probe.json").stdout
    table = door("results_table.py", "--results", "tiny run=out/probe.json")
    assert table.returncode == 0 and "tiny run" in table.stdout and f"{score:.3f}" in table.stdout
    wrong = door("results_table.py", "--results", "tiny run=out/none.json")
    assert wrong.returncode == 3 and "out/none.json" in wrong.stderr
