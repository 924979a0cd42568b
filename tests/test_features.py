"""Images to features: three extractors, the folder's layout, what is redone and what is refused."""

import io
import json
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_factory import make_shards, picture
from PIL import Image
from processes import ROOT, run_script
from safetensors.torch import load_file, save_file
from tiny_clip import write_tiny_clip

from mlcd_ds import checkpoint
from mlcd_ds.clustering.builtin_patches import PatchDictionary, learn_dictionary
from mlcd_ds.clustering.features import OPEN_ARRAYS, FeatureFolder, extract_features, load_extractor
from mlcd_ds.config import FeaturesConfig
from mlcd_ds.data.decode import decode_image
from mlcd_ds.data.tars import write_tar
from mlcd_ds.data.transforms import resize_shorter_and_center_crop
from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.models.vit import VisionTransformer, VitConfig
from mlcd_ds.topology import Topology

CPU = torch.device("cpu")
SMALL = {"dictionary_size": 16, "patches_to_fit": 2000, "patch_features": 12, "images_to_fit": 60}
TINY = VitConfig(
    image_size=16, patch_size=8, layers=1, width=16, heads=2, mlp_width=32, embed_dim=8, rope=False, activation="gelu",
    norm_eps=1e-5,
)  # fmt: skip


def config(shards, output, **changes) -> FeaturesConfig:
    return FeaturesConfig(shards=str(shards), output_dir=str(output), **(SMALL | changes))


def extract(shards, output, **changes) -> dict:
    """In one process."""
    return extract_features(config(shards, output, **changes), Topology.single())


def as_images(folder, size: int, shard: str = "00000", count: int = 40) -> torch.Tensor:
    """The first tar's pictures as an extractor should see them."""
    crops = [resize_shorter_and_center_crop(decode_image(picture(row), 10**7, size), size) for row in range(count)]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    make_shards(folder)
    return folder


def test_layout_is_clip_retrievals(tars, tmp_path):
    found = extract(tars / "*.tar", tmp_path / "f")
    assert (found["images"], found["skipped"], found["shards"], found["dim"]) == (123, 0, 3, 12)
    described = json.loads((tmp_path / "f" / "features.json").read_text())
    assert described["shards"] == ["00000", "00001", "00002"]
    assert described["dim"] == 12 and described["model"].startswith("builtin:patches:")
    for shard in range(3):
        array = np.load(tmp_path / "f" / "img_emb" / f"img_emb_{shard:05d}.npy")
        keys = pq.read_table(tmp_path / "f" / "metadata" / f"metadata_{shard:05d}.parquet").column("key").to_pylist()
        assert array.dtype == np.float16 and array.shape == (40 + shard, 12)
        assert keys == [f"{shard:05d}{row:04d}" for row in range(40 + shard)]
        np.testing.assert_allclose(np.linalg.norm(array.astype(np.float32), axis=1), 1, atol=2e-3)
    folder = FeatureFolder(tmp_path / "f")
    assert (folder.names, folder.rows, folder.dim) == (("00000", "00001", "00002"), (40, 41, 42), 12)


def test_features_are_those_of_the_extractor_in_tar_order(tars, tmp_path):
    extract(tars / "*.tar", tmp_path / "f", batch_size=7, workers=2)
    patches = PatchDictionary.load(tmp_path / "f" / "patches.npz")
    expected = patches.embed(as_images(tars, patches.image_size))
    array = np.load(tmp_path / "f" / "img_emb" / "img_emb_00000.npy")
    np.testing.assert_allclose(array, expected.numpy(), atol=1e-3)


def test_finished_shards_stay_and_unfinished_are_redone(tars, tmp_path):
    extract(tars / "*.tar", tmp_path / "f")
    kept, redone = (tmp_path / "f" / "img_emb" / f"img_emb_{shard:05d}.npy" for shard in (0, 1))
    before = redone.read_bytes()
    kept_at = kept.stat().st_mtime_ns
    # Killed before the metadata was written, in the middle of the array.
    (tmp_path / "f" / "metadata" / "metadata_00001.parquet").unlink()
    with pytest.raises(DataError, match="1 of the 3 shards .* have no features yet, e.g. 00001"):
        FeatureFolder(tmp_path / "f")
    redone.write_bytes(before[:100])
    redone.with_name(redone.name + ".tmp").write_bytes(b"half")
    found = extract(tars / "*.tar", tmp_path / "f")
    assert (found["images"], found["already"]) == (41, 2)
    assert redone.read_bytes() == before
    assert kept.stat().st_mtime_ns == kept_at


def test_a_dictionary_learnt_with_other_settings_is_not_taken_quietly(tars, tmp_path):
    extract(tars / "00000.tar", tmp_path / "f")
    with pytest.raises(
        DataError, match=r"patches.npz was learnt with other settings .*dictionary_size 16 then, 32 now"
    ):
        extract(tars / "*.tar", tmp_path / "f", dictionary_size=32)
    file = tmp_path / "f" / "patches.npz"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"patches.npz is no patch dictionary .*remove the file"):
        extract(tars / "*.tar", tmp_path / "f")


def test_same_dictionary_serves_other_shards(tars, tmp_path):
    extract(tars / "00000.tar", tmp_path / "a")
    extract(tars / "*.tar", tmp_path / "b", model=f"builtin:{tmp_path / 'a' / 'patches.npz'}")
    names = [json.loads((tmp_path / side / "features.json").read_text())["model"] for side in "ab"]
    assert names[0] == names[1]
    a, b = (np.load(tmp_path / side / "img_emb" / "img_emb_00000.npy") for side in "ab")
    assert np.array_equal(a, b)


def test_another_model_in_the_same_folder_is_refused(tars, tmp_path):
    extract(tars / "*.tar", tmp_path / "f")
    checkpoint.save_encoder(tmp_path / "encoder", "tiny", TINY, VisionTransformer(TINY, seed=0).state_dict())
    with pytest.raises(DataError, match=r"holds features of 'builtin:.*now asked for: 'run:tiny:.*--output_dir"):
        extract(tars / "*.tar", tmp_path / "f", model=f"run:{tmp_path}")


def test_run_extractor_is_the_trained_encoder(tars, tmp_path):
    model = VisionTransformer(TINY, seed=3).eval()
    checkpoint.save_encoder(tmp_path / "encoder", "tiny", TINY, model.state_dict())
    extract(tars / "*.tar", tmp_path / "f", model=f"run:{tmp_path}")
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model(as_images(tars, 16)), dim=1)
    np.testing.assert_allclose(np.load(tmp_path / "f" / "img_emb" / "img_emb_00000.npy"), expected.numpy(), atol=1e-3)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return folder, write_tiny_clip(folder)


def reference_image_features(folder, model, rows):
    """transformers' own processor and model."""
    import transformers

    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    pictures = [Image.open(io.BytesIO(picture(row, 40))).convert("RGB") for row in rows]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = model.get_image_features(pixel_values=pixels)
    return torch.nn.functional.normalize(getattr(features, "pooler_output", features), dim=1)


def test_hf_image_features_are_transformers_own(clip, tmp_path):
    folder, model = clip
    make_shards(tmp_path / "tars", 1, 9, size=40)
    found = extract(tmp_path / "tars" / "*.tar", tmp_path / "f", model=f"hf:{folder}", batch_size=4)
    assert found["dim"] == 10 and found["model"].startswith(f"hf:{folder.name}:")
    ours = np.load(tmp_path / "f" / "img_emb" / "img_emb_00000.npy")
    # Our crop is resized in bytes by PIL, theirs too; the rest is float16 on the disk.
    np.testing.assert_allclose(ours, reference_image_features(folder, model, range(9)).numpy(), atol=4e-3)


def test_hf_mean_of_image_and_text(clip, tmp_path):
    import transformers

    folder, model = clip
    captions = ["a red cat", "", "blue blue a", None]
    samples = []
    for row, caption in enumerate(captions):
        parts = {"jpg": picture(row, 40)} | ({} if caption is None else {"txt": caption.encode()})
        samples.append((f"{row:09d}", parts))
    write_tar(tmp_path / "00000.tar", samples)
    found = extract(tmp_path / "00000.tar", tmp_path / "f", model=f"hf:{folder}", embedding="mean")
    assert found["without_text"] == 2 and found["model"].endswith(":mean")
    images = reference_image_features(folder, model, range(4))
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        [captions[0], captions[2]], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        texts = model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    texts = torch.nn.functional.normalize(getattr(texts, "pooler_output", texts), dim=1)
    expected = images.clone()
    expected[[0, 2]] = torch.nn.functional.normalize(images[[0, 2]] + texts, dim=1)
    np.testing.assert_allclose(np.load(tmp_path / "f" / "img_emb" / "img_emb_00000.npy"), expected.numpy(), atol=4e-3)
    stored = np.load(tmp_path / "f" / "text_emb" / "text_emb_00000.npy")
    np.testing.assert_allclose(stored[[0, 2]], texts.numpy(), atol=4e-3)


def rewrite_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_hf_crop_may_be_smaller_than_the_resized_side(clip, tmp_path):
    _, model = clip
    model.save_pretrained(tmp_path / "clip")
    shutil.copy(clip[0] / "preprocessor_config.json", tmp_path / "clip")
    rewrite_json(tmp_path / "clip" / "preprocessor_config.json", size={"shortest_edge": 30}, image_mean=[0.1, 0.2, 0.3])
    make_shards(tmp_path / "tars", 1, 5, size=40)
    extract(tmp_path / "tars" / "*.tar", tmp_path / "f", model=f"hf:{tmp_path / 'clip'}")
    ours = np.load(tmp_path / "f" / "img_emb" / "img_emb_00000.npy")
    np.testing.assert_allclose(ours, reference_image_features(tmp_path / "clip", model, range(5)).numpy(), atol=4e-3)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"do_normalize": False}, "do_normalize false"),
        ({"rescale_factor": 1.0}, "rescale_factor 1.0"),
        ({"size": {"height": 24, "width": 24}}, "is not CLIP's"),
        ({"size": {"shortest_edge": 20}}, "is not CLIP's"),
    ],
)
def test_hf_preprocessing_that_we_do_not_do_is_refused(clip, tmp_path, changes, word):
    shutil.copytree(clip[0], tmp_path / "clip")
    rewrite_json(tmp_path / "clip" / "preprocessor_config.json", **changes)
    with pytest.raises(DataError, match=word):
        load_extractor(f"hf:{tmp_path / 'clip'}", CPU, "float32")


def test_hf_models_that_lack_weights_are_refused(clip, tmp_path):
    """transformers fills what is missing with random numbers."""
    shutil.copytree(clip[0], tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 1 of a CLIP model's weights, e.g. visual_projection.weight"):
        load_extractor(f"hf:{tmp_path / 'clip'}", CPU, "float32")


def test_hf_without_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install transformers"):
        load_extractor("hf:anything", CPU, "float32")


def test_hf_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot be loaded as a CLIP model.*preprocessor_config.json"):
        load_extractor(f"hf:{tmp_path}", CPU, "float32")


def test_unknown_specs_are_refused(tars, tmp_path):
    with pytest.raises(ConfigError, match=r"'clip:x'.*builtin:patches.*hf:.*run:"):
        load_extractor("clip:x", CPU, "auto")
    with pytest.raises(ConfigError, match="only hf: models"):
        extract(tars / "*.tar", tmp_path / "f", embedding="mean")


def test_broken_images_are_counted_and_too_many_are_fatal(tmp_path):
    samples = [(f"{row:09d}", {"jpg": picture(row)}) for row in range(20)]
    samples[3] = ("000000003", {"jpg": picture(3)[:100]})
    write_tar(tmp_path / "00000.tar", samples)
    found = extract(tmp_path / "00000.tar", tmp_path / "f", max_skipped_fraction=0.1)
    assert (found["images"], found["skipped"]) == (19, 1)
    assert found["skipped_names"][0].startswith("00000/000000003: broken")
    keys = FeatureFolder(tmp_path / "f").keys("00000")
    assert len(keys) == 19 and "000000003" not in keys
    with pytest.raises(DataError, match=r"1 of 20 images could not be used.*--max_skipped_fraction.*00000/000000003"):
        extract(tmp_path / "00000.tar", tmp_path / "g", max_skipped_fraction=0.01)
    # Starting again finds the shard finished, and still refuses.
    with pytest.raises(DataError, match=r"1 of 20 images .*00000/000000003.*remove metadata/"):
        extract(tmp_path / "00000.tar", tmp_path / "g", max_skipped_fraction=0.01)
    assert extract(tmp_path / "00000.tar", tmp_path / "g", max_skipped_fraction=0.1)["already"] == 1


def test_features_that_are_no_numbers_stop_with_shard_and_key(tars, tmp_path):
    model = VisionTransformer(TINY, seed=3)
    with torch.no_grad():
        model.projection.weight[0, 0] = torch.nan
    checkpoint.save_encoder(tmp_path / "encoder", "tiny", TINY, model.state_dict())
    with pytest.raises(DataError, match=r"features that are no numbers for 40 image.*00000.tar.*'000000000'"):
        extract(tars / "*.tar", tmp_path / "f", model=f"run:{tmp_path}")
    assert not list((tmp_path / "f").rglob("*.npy"))


def test_builtin_is_deterministic_and_tells_images_apart():
    images = np.stack([np.asarray(Image.open(io.BytesIO(picture(row)))) for row in range(60)]).transpose(0, 3, 1, 2)
    settings = config("x", "x")
    one, two = learn_dictionary(images, settings), learn_dictionary(images, settings)
    assert np.array_equal(one.dictionary_KP, two.dictionary_KP) and np.array_equal(one.pca_Fd, two.pca_Fd)
    features = one.embed(torch.from_numpy(images))
    assert features.shape == (60, 12)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(60))
    similarity = features @ features.T - 2 * torch.eye(60)
    assert similarity.max() < 0.999


def test_builtin_features_do_not_depend_on_the_number_of_threads():
    images = np.stack([np.asarray(Image.open(io.BytesIO(picture(row)))) for row in range(30)]).transpose(0, 3, 1, 2)
    patches, threads = learn_dictionary(images, config("x", "x")), torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(patches.all_activations(torch.from_numpy(images)))
            assert torch.get_num_threads() == count  # the workers' own setting stays theirs
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    with torch.inference_mode():
        dense = torch.cat([patches.activations(torch.from_numpy(images[row : row + 1])) for row in range(30)])
    torch.testing.assert_close(found[0], dense, rtol=1e-4, atol=1e-5)


def test_two_ranks_share_the_shards(tars, tmp_path):
    arguments = [ROOT / "tools" / "extract_features.py", f"--shards={tars / '*.tar'}", f"--output_dir={tmp_path / 'f'}"]
    arguments += [f"--{name}={value}" for name, value in SMALL.items()]
    ended = run_script(2, arguments, fresh=True)
    assert [rank.code for rank in ended] == [0, 0], ended[0].output + ended[1].output
    assert "this rank: 82 images now" in ended[0].output
    assert "123/123 images" in ended[0].output and "on 2 rank(s), 3/3 shards" in ended[0].output
    extract(tars / "*.tar", tmp_path / "alone")
    for name in ("img_emb/img_emb_00001.npy", "img_emb/img_emb_00002.npy"):
        assert (tmp_path / "f" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def published(folder, rows=5, dim=4, count=2):
    """A folder as clip-retrieval publishes it: no features.json."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for shard in range(count):
        np.save(folder / "img_emb" / f"img_emb_{shard}.npy", np.eye(rows, dim, dtype=np.float16) + 0.1)
        table = pa.table({"key": [f"{shard}{row}" for row in range(rows)], "url": ["u"] * rows})
        pq.write_table(table, folder / "metadata" / f"metadata_{shard}.parquet")
    return folder


def test_published_embeddings_open_as_they_are(tmp_path):
    folder = FeatureFolder(published(tmp_path / "laion"))
    assert (folder.names, folder.rows, folder.model) == (("0", "1"), (5, 5), "unknown:laion")
    assert folder.keys("1") == ["10", "11", "12", "13", "14"]
    rows = folder.unit_rows("0", 1, 3)
    assert rows.dtype == np.float32 and np.allclose(np.linalg.norm(rows, axis=1), 1)


def cut_array(folder):
    file = folder / "img_emb" / "img_emb_1.npy"
    file.write_bytes(file.read_bytes()[:-3])
    return "img_emb_1.npy", "missing or cut"


def missing_array(folder):
    (folder / "img_emb" / "img_emb_1.npy").unlink()
    return "img_emb_1.npy", "extract_features.py again"


def another_dimension(folder):
    np.save(folder / "img_emb" / "img_emb_1.npy", np.ones((5, 6), np.float16))
    return "img_emb_1.npy has 6 dimensions", "has 4"


def other_row_count(folder):
    np.save(folder / "img_emb" / "img_emb_1.npy", np.ones((4, 4), np.float16))
    return "has 4 rows", "metadata_1.parquet has 5"


def no_floats(folder):
    np.save(folder / "img_emb" / "img_emb_1.npy", np.ones((5, 4), np.int64))
    return "int64", "expected floats"


def unfinished(folder):
    (folder / "metadata" / "metadata_1.parquet").unlink()
    return "1 shard(s)", "img_emb_1.npy has no metadata_1.parquet yet"


def cut_metadata(folder):
    file = folder / "metadata" / "metadata_1.parquet"
    file.write_bytes(file.read_bytes()[:50])
    return "metadata_1.parquet is missing or damaged", "extract_features.py again"


def cut_description(folder):
    (folder / "features.json").write_text('{"model": "x')
    return "features.json cannot be read", "Remove it"


def description_without_model(folder):
    (folder / "features.json").write_text("{}")
    return "features.json cannot be read", "expected JSON with a field 'model'"


def empty_array(folder):
    (folder / "img_emb" / "img_emb_1.npy").write_bytes(b"")
    return "img_emb_1.npy", "missing or cut"


def pickled(folder):
    np.save(folder / "img_emb" / "img_emb_1.npy", np.array([{"a": 1}] * 5, dtype=object))
    return "img_emb_1.npy", "cannot be read"


def not_all_extracted(folder):
    """Extraction was stopped before it began the third shard."""
    (folder / "features.json").write_text('{"model": "x", "shards": ["0", "1", "2"]}')
    return "1 of the 3 shards", "e.g. 2", "extract_features.py again"


SPOILERS = [cut_array, empty_array, missing_array, another_dimension, other_row_count, no_floats, pickled]
SPOILERS += [unfinished, not_all_extracted, cut_metadata, cut_description, description_without_model]


def test_more_shards_than_a_process_may_open_files(tmp_path):
    folder = published(tmp_path / "f", count=150)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + OPEN_ARRAYS + 20, limits[1]))
    try:
        features = FeatureFolder(folder)
        assert sum(len(features.unit_rows(name, 0, 5)) for name in features.names) == features.num_features == 750
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("spoil", SPOILERS)
def test_bad_feature_folders_are_named(tmp_path, spoil):
    folder = published(tmp_path / "f")
    words = spoil(folder)
    with pytest.raises(DataError) as caught:
        FeatureFolder(folder)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("value", "what"), [(np.nan, "no numbers"), (np.inf, "no numbers"), (0, "all zeros")])
def test_rows_that_cannot_be_used_are_named(tmp_path, value, what):
    folder = published(tmp_path / "f")
    array = np.load(folder / "img_emb" / "img_emb_1.npy")
    array[3] = value
    np.save(folder / "img_emb" / "img_emb_1.npy", array)
    with pytest.raises(DataError, match=rf"img_emb_1.npy: row 3 \(key '13'\).*{what}"):
        FeatureFolder(folder).unit_rows("1", 2, 5)
    with pytest.raises(DataError, match="holds no features: expected metadata/"):
        FeatureFolder(tmp_path)


def test_dropped_rows_are_as_if_they_had_not_been_there(tmp_path):
    folder = published(tmp_path / "f", rows=9, dim=12)
    array = np.load(folder / "img_emb" / "img_emb_1.npy")
    array[[0, 4, 5]], array[8, 2] = 0, np.nan
    np.save(folder / "img_emb" / "img_emb_1.npy", array)
    features = FeatureFolder(folder)
    before = features.fingerprint()
    assert features.bad_rows("0").tolist() == [] and features.bad_rows("1").tolist() == [0, 4, 5, 8]
    features.drop({"1": features.bad_rows("1")})
    assert features.rows == (9, 5) and features.num_features == 14 and features.fingerprint() != before
    kept = array[[1, 2, 3, 6, 7]].astype(np.float32)
    kept /= np.linalg.norm(kept, axis=1, keepdims=True)
    np.testing.assert_allclose(features.unit_rows("1", 0, 5), kept, atol=1e-6)
    np.testing.assert_allclose(features.unit_rows("1", 2, 5), kept[2:], atol=1e-6)
    np.testing.assert_allclose(features.unit_rows("1", 1, 3, np.array([0, 3, 4])), kept[[3, 4]], atol=1e-6)
    assert features.keys("1") == ["11", "12", "13", "16", "17"]
    values, usable = FeatureFolder(folder).usable_rows("1", 3, 6)
    assert usable.tolist() == [True, False, False] and (values[1:] == 0).all()


def test_keys_of_published_folders_without_a_column_of_keys(tmp_path):
    folder = published(tmp_path / "f")
    pq.write_table(
        pa.table({"image_path": ["a/b/0000.x.jpg", "0001.jpg", "0002", "3", "4"]}),
        folder / "metadata/metadata_1.parquet",
    )
    assert FeatureFolder(folder).keys("1") == ["0000", "0001", "0002", "3", "4"]
    pq.write_table(pa.table({"key": ["a", None, "b", "c", "d"]}), folder / "metadata/metadata_1.parquet")
    with pytest.raises(DataError, match="metadata_1.parquet: row 1 of column `key` is None"):
        FeatureFolder(folder).keys("1")
    pq.write_table(pa.table({"url": ["a"] * 5}), folder / "metadata/metadata_1.parquet")
    with pytest.raises(DataError, match="no readable column `key` or `image_path`"):
        FeatureFolder(folder).keys("1")
