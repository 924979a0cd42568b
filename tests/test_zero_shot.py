"""Zero-shot classification, retrieval, and the towers in a CLIPModel folder: held to plain arithmetic and transformers."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from data_factory import picture
from processes import ROOT
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_contrastive_runs import caption
from test_text import CAPTIONS, TINY_TEXT
from test_text import scrambled as scrambled_text
from test_vit import TINY, TINY_ROPE, images, normalised, scrambled
from transformers import AutoTokenizer, CLIPModel

from mlcd_ds import checkpoint
from mlcd_ds.clustering.features import extract_features
from mlcd_ds.config import ExportConfig, FeaturesConfig, RetrievalConfig, ZeroShotConfig
from mlcd_ds.data.decode import decode_image
from mlcd_ds.data.tars import write_tar
from mlcd_ds.data.tokenizer import train_tokenizer
from mlcd_ds.data.transforms import resize_shorter_and_center_crop
from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.evaluation import retrieval, zero_shot
from mlcd_ds.evaluation.results import read_results
from mlcd_ds.evaluation.retrieval import own_ranks, retrieval_set
from mlcd_ds.evaluation.text_sets import evaluate_text_sets
from mlcd_ds.evaluation.towers import find_test_sets, load_towers
from mlcd_ds.evaluation.zero_shot import CLASSES_FILE, TEMPLATES_FILE, ensemble, files_of_sets, zero_shot_set
from mlcd_ds.models import hf, hf_text
from mlcd_ds.topology import Topology

FILES = [CLASSES_FILE, TEMPLATES_FILE]
NAMES = ["red boat", "cat", "dog", "sea", "blue sky", "number"]
TEMPLATES = ["a {c}", "a picture of a {c}.", "two {c}s"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a run on captions leaves for tools: both towers, random to the last bias, and their tokenizer."""
    folder = tmp_path_factory.mktemp("towers")
    tokenizer = train_tokenizer([*CAPTIONS, *map(caption, range(9))], 600, folder / "tokenizer.json")
    image = scrambled(TINY)
    config = TINY_TEXT.model_copy(update={"vocabulary": tokenizer.vocabulary, "end_token": tokenizer.end_token})
    text = scrambled_text(config)
    checkpoint.save_encoder(folder / "run" / "encoder", "tiny", TINY, image.state_dict())
    weights = {**text.state_dict(), "log_scale": torch.tensor([3.3])}
    checkpoint.save_text(folder / "run" / "text", "tiny_text", config, weights, tokenizer)
    return folder / "run"


def write_sets(root, several: bool = False, classes_above: int = 0):
    """`one`: 30 images in 3 tars with a class each; `many`: with several; `pairs`: with captions, some of them shared."""
    truth = {"one": [], "many": [], "pairs": []}
    for name in truth:
        for tar in range(3):
            samples = []
            for row in range(10):
                number = tar * 10 + row
                found = [number % 5] if name != "many" else sorted({number % 5, number % 4})
                texts = [caption(number % 8)] + ([caption(number + 40)] if number % 3 == 0 else [])
                members = {
                    "one": {"cls": str(found[0] + classes_above).encode()},
                    "many": {"json": json.dumps({"classes": found}).encode()},
                    "pairs": {"txt": "\n".join(texts).encode()},
                }[name]
                samples.append((f"s{number:07d}", {"jpg": picture(number), **members}))
                truth[name].append(texts if name == "pairs" else found)
            write_tar(root / name / "test" / f"{tar}.tar", samples)
        (root / name / "test" / "nshards.txt").write_text("3\n")
        (root / name / "classnames.txt").write_text("\n".join(NAMES) + "\n")
        (root / name / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    (root / "pairs" / "dataset_type.txt").write_text("retrieval")
    (root / "pairs" / "classnames.txt").unlink()
    return truth


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    return root, write_sets(root)


def unit_images(run) -> torch.Tensor:
    """The 30 pictures, through the image tower, without the code under test."""
    crops = [resize_shorter_and_center_crop(decode_image(picture(i), 10**8), 32) for i in range(30)]
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    with torch.no_grad():
        return torch.nn.functional.normalize(checkpoint.load_encoder(run)(pixels), dim=1)


def unit_texts(run, texts) -> torch.Tensor:
    tower = checkpoint.load_text(run)
    with torch.no_grad():
        embedded = tower.model(torch.from_numpy(tower.tokenizer.encode_all(texts, tower.model.config.context)))
    return torch.nn.functional.normalize(embedded, dim=1)


# ---------------------------------------------------------------------------------------------- zero-shot


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_classes_are_told_by_the_ensemble_of_their_templates(trained, sets, world_size):
    """world_size 4: more ranks than tars."""
    root, truth = sets
    config = ZeroShotConfig(
        model=f"run:{trained}", root=str(root), datasets="one,many", batch_size=7, precision="float32"
    )
    (one, many), _ = find_test_sets(config, FILES)
    towers = load_towers(config, torch.device("cpu"))
    classes = torch.stack([
        torch.nn.functional.normalize(unit_texts(trained, [t.replace("{c}", name) for t in TEMPLATES]).mean(0), dim=0)
        for name in NAMES
    ])  # fmt: skip
    scores = unit_images(trained) @ classes.T
    for tested in (one, many):
        results = run_ranks(world_size, lambda topology, tested=tested: zero_shot_set(config, tested, towers, topology))
        for result in results:
            own = torch.tensor([found[0] for found in truth["one"]])
            if tested is one:
                top5 = scores.topk(5, dim=1).indices
                right = scores.argmax(1) == own
                recall = np.mean([right[own == c].double().mean() for c in range(5)])
                assert result.metrics["acc1"] == pytest.approx(right.double().mean())
                assert result.metrics["acc5"] == pytest.approx((top5 == own[:, None]).any(1).double().mean())
                assert result.metrics["mean_per_class_recall"] == pytest.approx(recall)
                assert result.details["classes_without_test_image"] == 1 and result.details["n_test"] == 30
            else:
                from sklearn.metrics import average_precision_score

                matrix = np.array([[c in found for c in range(5)] for found in truth["many"]])
                expected = average_precision_score(matrix, scores[:, :5].numpy())
                assert result.metrics["mean_average_precision"] == pytest.approx(expected, abs=1e-6)


def test_an_ensemble_is_the_mean_of_unit_vectors_made_unit_again():
    embedded = torch.nn.functional.normalize(torch.randn(2, 3, 5), dim=2)
    found = ensemble(embedded)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(found[0] * embedded[0].mean(0).norm(), embedded[0].mean(0))


def test_results_are_written_in_clip_benchmarks_shape(trained, sets, tmp_path, capsys):
    root, _ = sets
    (tmp_path / "root/wds_vtab-cifar10").mkdir(parents=True)
    for name in ("test", *FILES):
        (tmp_path / "root/wds_vtab-cifar10" / name).symlink_to(root / "one" / name)
    for datasets in ("all", "cifar10"):
        config = ZeroShotConfig(model="x", root=str(tmp_path / "root"), datasets=datasets)
        found, left_out = find_test_sets(config, FILES)
        assert [tested.name for tested in found] == ["wds/vtab/cifar10"] and not left_out
    published = tmp_path / "published"  # as CLIP_benchmark downloads them
    for name in ("flickr30k", "imagenet-a", "foo"):
        (published / f"wds_{name}").mkdir(parents=True)
        for file in (root / ("pairs" if name == "flickr30k" else "one")).iterdir():
            (published / f"wds_{name}" / file.name).symlink_to(file)
    config = RetrievalConfig(model="x", root=str(published), datasets="mscoco_captions,flickr30k")
    found, left_out = find_test_sets(config, None)
    assert [tested.name for tested in found] == ["wds/flickr30k"] and left_out == ["mscoco_captions (not there)"]
    for datasets, expected in (("imagenet-a", ["wds/imagenet-a"]), ("all", ["wds_foo", "wds/imagenet-a"])):
        config = ZeroShotConfig(model="x", root=str(published), datasets=datasets)
        assert [tested.name for tested in find_test_sets(config, FILES)[0]] == expected
    (published / "wds_foo" / TEMPLATES_FILE).unlink()
    assert find_test_sets(config, FILES)[1] == [f"wds_foo (no {TEMPLATES_FILE})"]
    config = config.model_copy(update={"templates": "own.txt"})
    assert len(find_test_sets(config, files_of_sets(config))[0]) == 2
    config = RetrievalConfig(model=f"run:{trained}", root=str(published), datasets="mscoco_captions,flickr30k")
    assert evaluate_text_sets(config, retrieval.TASK, retrieval_set)[0].dataset == "wds/flickr30k"
    assert "left out (1): mscoco_captions (not there)" in capsys.readouterr().out
    config = ZeroShotConfig(model=f"run:{trained}", root=str(root), output_dir=str(tmp_path))
    evaluate_text_sets(config, zero_shot.TASK, zero_shot_set, FILES)
    evaluate_text_sets(
        RetrievalConfig(model=f"run:{trained}", root=str(root), output_dir=str(tmp_path)),
        retrieval.TASK, retrieval_set,
    )  # fmt: skip
    found = {(result.dataset, result.task): result for result in read_results(tmp_path).values()}
    assert set(found) == {(name, "zeroshot_classification") for name in ("one", "many")} | {
        ("pairs", "zeroshot_retrieval")
    }
    assert found["one", "zeroshot_classification"].model == "tiny+tiny_text"
    metrics = [f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10)]
    assert list(found["pairs", "zeroshot_retrieval"].metrics) == metrics
    printed = capsys.readouterr().out
    assert "6 classes x 3 templates" in printed and "30 images, 40 texts, 22 of which repeat another" in printed


def test_finished_sets_are_kept_and_the_others_made(trained, tmp_path, capsys):
    write_sets(tmp_path)
    config = ZeroShotConfig(model=f"run:{trained}", root=str(tmp_path), output_dir=str(tmp_path / "out"))

    def evaluated(evaluate=zero_shot_set, **changes) -> list[str]:
        """The sets that were not kept."""
        made = []

        def noting(config, tested, *rest):
            made.append(tested.name)
            return evaluate(config, tested, *rest)

        kind, task, marker = ZeroShotConfig, zero_shot.TASK, FILES
        if evaluate is retrieval_set:
            kind, task, marker = RetrievalConfig, retrieval.TASK, None
        settings = {"model": config.model, "root": config.root, "output_dir": config.output_dir} | changes
        evaluate_text_sets(kind(**settings), task, noting, marker)
        return made

    def killed(config, tested, *rest):
        if tested.name == "one":
            raise KeyboardInterrupt
        return zero_shot_set(config, tested, *rest)

    with pytest.raises(KeyboardInterrupt):
        evaluated(killed)
    assert evaluated() == ["one"] and "newer than its inputs: kept" in capsys.readouterr().out
    first = read_results(tmp_path / "out")
    assert evaluated() == [] and read_results(tmp_path / "out") == first
    assert evaluated(datasets="one", batch_size=5) == [] and evaluated(datasets="one", overwrite=True) == ["one"]
    assert evaluated(datasets="one", max_pixels=10**6) == ["one"] and evaluated(datasets="one") == ["one"]
    assert evaluated(retrieval_set) == ["pairs"] and evaluated(retrieval_set) == []
    assert evaluated(retrieval_set, recall_k="1,2") == ["pairs"]
    later = max(file.stat().st_mtime for file in (tmp_path / "out").glob("*")) + 10
    os.utime(tmp_path / "one" / CLASSES_FILE, (later, later))
    assert evaluated() == ["one"]
    shutil.copytree(trained, tmp_path / "run")
    tower = load_file(tmp_path / "run/text/text.safetensors")
    before = (tmp_path / "run/text/text.safetensors").stat()
    assert evaluated(model=f"run:{tmp_path / 'run'}", datasets="many") == ["many"]
    name = next(name for name in tower if name.endswith("weight"))
    save_file(tower | {name: tower[name] * 1.01}, tmp_path / "run/text/text.safetensors")
    os.utime(tmp_path / "run/text/text.safetensors", (before.st_atime, before.st_mtime))
    assert evaluated(model=f"run:{tmp_path / 'run'}", datasets="many") == ["many"]  # by the hash of the weights


def test_what_does_not_fit_is_refused_with_the_cure(trained, tmp_path):
    def refused(match, error=DataError, **changes):
        values = {"model": f"run:{trained}", "root": str(tmp_path), "datasets": "one"} | changes
        with pytest.raises(error, match=match):
            evaluate_text_sets(ZeroShotConfig(**values), zero_shot.TASK, zero_shot_set, FILES)

    refused("'absent' is none of .* and .*absent holds no test/", ConfigError, datasets="absent")
    refused(r"none of the sets 'mnist' lies below .* like .*mnist with test/", datasets="mnist")
    refused("holds no set", datasets="all")
    write_sets(tmp_path, classes_above=3)
    refused("image s0000003 is of class 6, but classnames.txt .* names 6")
    refused("expected run:RUN", ConfigError, model="builtin:x")
    (tmp_path / "one" / "zeroshot_classification_templates.txt").write_text("a cat\na {c}\n")
    refused("1 of 2 templates have no {c} for the name, e.g. 'a cat'")
    (tmp_path / "one" / "classnames.txt").write_text("boat\n\ncat\n")
    refused("line 2 of 3 is empty: expected the name of class 0, 1, ... a line each")
    (tmp_path / "one" / "classnames.txt").write_text("boat\ncat\n\n")
    (tmp_path / "one" / "zeroshot_classification_templates.txt").unlink()
    refused("--templates FILE names another file")
    with pytest.raises(ConfigError, match="--recall_k '0,1'"):
        config = RetrievalConfig(model=f"run:{trained}", root=str(tmp_path), datasets="pairs", recall_k="0,1")
        evaluate_text_sets(config, retrieval.TASK, retrieval_set, None)


# ---------------------------------------------------------------------------------------------- retrieval


@pytest.mark.parametrize("world_size", [1, 3])
def test_recalls_are_those_of_the_whole_matrix(trained, sets, world_size):
    root, truth = sets
    config = RetrievalConfig(
        model=f"run:{trained}", root=str(root), datasets="pairs", block_rows=7, precision="float32", recall_k="1,3,20"
    )
    ((tested,), _) = find_test_sets(config, None)
    towers = load_towers(config, torch.device("cpu"))
    texts = [text for found in truth["pairs"] for text in found]
    owner = [image for image, found in enumerate(truth["pairs"]) for _ in found]
    scores = towers_scores(trained, texts)
    for result in run_ranks(world_size, lambda topology: retrieval_set(config, tested, towers, topology)):
        for k in (1, 3, 20):
            of_images = np.mean([any(owner[t] == i for t in row[:k]) for i, row in enumerate(ordered(scores))])
            of_texts = np.mean([owner[t] in row[:k] for t, row in enumerate(ordered(scores.T))])
            assert result.metrics[f"text_retrieval_recall@{k}"] == pytest.approx(of_images)
            assert result.metrics[f"image_retrieval_recall@{k}"] == pytest.approx(of_texts)
        assert result.details["distinct_texts"] == len(set(texts)) < len(texts)


def towers_scores(run, texts) -> np.ndarray:
    """Equal texts have equal columns."""
    distinct = sorted(set(texts))
    columns = dict(zip(distinct, (unit_images(run) @ unit_texts(run, distinct).T).numpy().T, strict=True))
    return np.stack([columns[text] for text in texts], axis=1)


def ordered(scores) -> np.ndarray:
    """Of each row, the columns from the highest score on; equal ones in their order."""
    return np.argsort(-scores, axis=1, kind="stable")


def test_equal_scores_stand_in_the_order_of_the_set():
    images = torch.eye(4)[[0, 0, 1, 2]]
    texts = torch.eye(4)[[3, 0, 0, 1, 2, 2]]
    owner = torch.tensor([0, 0, 1, 2, 3, 3])
    of_images, of_texts = own_ranks(images, texts, owner, 2, Topology.single())
    assert of_images.tolist() == [0, 1, 0, 0] and of_texts.tolist() == [0, 0, 1, 0, 0, 0]


# ---------------------------------------------------------------------------------------------- Hugging Face


def export(trained, out, **changes):
    import runpy

    tool = runpy.run_path(str(ROOT / "tools" / "export_hf.py"), run_name="tool")
    tool["export"](ExportConfig(run=str(trained), output_dir=str(out), **changes))


def test_transformers_computes_the_same_features_and_the_folder_comes_back_bit_for_bit(trained, tmp_path, capsys):
    export(trained, tmp_path / "out", kind="clip")
    assert "CLIPModel, float32, read back equal" in capsys.readouterr().out
    theirs, loaded = CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    image, tower = checkpoint.load_encoder(trained), checkpoint.load_text(trained)
    pixels = images(TINY, 3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer(
        [*CAPTIONS, "long " * 40], padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )
    ours = torch.from_numpy(tower.tokenizer.encode_all([*CAPTIONS, "long " * 40], 16))
    assert torch.equal(batch.input_ids, ours)
    with torch.no_grad():
        output = theirs.eval()(pixel_values=normalised(pixels).float(), **batch)
        unit = torch.nn.functional.normalize
        torch.testing.assert_close(output.image_embeds, unit(image(pixels), dim=1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.text_embeds, unit(tower.model(ours), dim=1), rtol=1e-5, atol=1e-5)
    assert theirs.logit_scale.item() == pytest.approx(3.3)
    again = checkpoint.load_text(f"hf:{tmp_path / 'out'}")
    assert again.model.config == tower.model.config and torch.equal(again.log_scale, tower.log_scale)
    for ours_there, theirs_there in (
        (tower.model, again.model), (image, checkpoint.load_encoder(f"hf:{tmp_path / 'out'}")),
    ):  # fmt: skip
        pairs = zip(ours_there.state_dict().values(), theirs_there.state_dict().values(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| text preset | tiny_text, 3 x 48, 4 heads, 16 tokens of" in card and "cosines x 27.11" in card
    shutil.rmtree(tmp_path / "out")
    export(trained, tmp_path / "image", kind="clip_vision")
    assert "CLIPVisionModelWithProjection, float32" in capsys.readouterr().out


def test_the_folder_scores_what_the_run_scores(trained, sets, tmp_path):
    root, _ = sets
    export(trained, tmp_path / "out")
    for config, task, evaluate in (
        (ZeroShotConfig(model="x", root=str(root), datasets="one"), zero_shot.TASK, zero_shot_set),
        (RetrievalConfig(model="x", root=str(root), datasets="pairs"), retrieval.TASK, retrieval_set),
    ):
        one, other = (
            evaluate_text_sets(config.model_copy(update={"model": model}), task, evaluate, None)[0].metrics
            for model in (f"run:{trained}", f"hf:{tmp_path / 'out'}")
        )
        assert one == pytest.approx(other, abs=1e-6)


def test_what_clip_models_cannot_hold_is_refused(tmp_path):
    image, text = scrambled(TINY_ROPE), scrambled_text(TINY_TEXT)
    with pytest.raises(ConfigError, match="rotary positions, which CLIPModel does not know"):
        hf_text.write_pair(
            tmp_path / "out",
            (TINY_ROPE, image.state_dict()),
            (TINY_TEXT, text.state_dict()),
            torch.tensor([1.0]),
            {},
            "",
        )
    two = TINY_TEXT.model_copy(update={"end_token": 2})
    with pytest.raises(ConfigError, match="end token has the id 2"):
        hf_text.write_pair(
            tmp_path / "out",
            (TINY, scrambled(TINY).state_dict()),
            (two, text.state_dict()),
            torch.tensor([1.0]),
            {},
            "",
        )
    hf.write_folder(tmp_path / "image", TINY, scrambled(TINY).state_dict(), "card")
    with pytest.raises(checkpoint.CheckpointError, match="texts need a whole CLIPModel"):
        checkpoint.load_text(f"hf:{tmp_path / 'image'}")
    assert not (tmp_path / "out").exists()


def test_features_may_be_the_mean_of_image_and_caption(trained, sets, tmp_path):
    root, _ = sets
    values = {"shards": str(root / "pairs/test/{0..2}.tar"), "model": f"run:{trained}", "embedding": "mean"}
    found = extract_features(FeaturesConfig(**values, output_dir=str(tmp_path)), Topology.single())
    assert found["images"] == 30 and found["model"].endswith(":mean") and found["without_text"] == 0
    texts = np.load(tmp_path / "text_emb" / "text_emb_0.npy")
    assert texts.shape == (10, 20)
