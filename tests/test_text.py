"""The text tower: held to transformers' CLIP; both towers as one model; tokenizers."""

import pytest
import torch
from data_factory import picture
from test_vit import TINY, images
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from mlcd_ds.batch import NO_IMAGE
from mlcd_ds.config import RunConfig
from mlcd_ds.data.captions import CaptionError, captions_of, read_caption
from mlcd_ds.data.loader import ImageLabelLoader
from mlcd_ds.data.plan import EpochPlan
from mlcd_ds.data.shards import build_shard_table
from mlcd_ds.data.tars import write_tar
from mlcd_ds.data.tokenizer import CaptionTokenizer, train_tokenizer
from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.models import hf_text
from mlcd_ds.models.text import MAX_SCALE, TEXT_PRESETS, ImageTextModel, TextConfig, TextTransformer, text_preset
from mlcd_ds.models.vit import VisionTransformer, decay_groups
from mlcd_ds.topology import Topology

TINY_TEXT = TextConfig(
    layers=3, width=48, heads=4, mlp_width=96, embed_dim=20, activation="quick_gelu", norm_eps=1e-5, context=16,
    vocabulary=60, end_token=59,
)  # fmt: skip
CAPTIONS = ["a red boat", "Two CATS and a dog!", "naïve Zürich 🚢", "a boat on the sea, it's blue"]


def scrambled(config: TextConfig) -> TextTransformer:
    """A tower whose every parameter, biases and norms too, is random."""
    model = TextTransformer(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens(config: TextConfig, lengths=(4, 9, 16)) -> torch.Tensor:
    """Random texts of so many tokens, with what stands behind the end token random as well."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.randint(0, config.vocabulary, (len(lengths), config.context), generator=generator)
    rows[rows == config.end_token] = 3
    for row, length in zip(rows, lengths, strict=True):
        row[length - 1] = config.end_token
    return rows


@pytest.mark.parametrize("name", [None, *TEXT_PRESETS])
def test_transformers_computes_the_same_embeddings(name):
    narrow = {"layers": 2, "width": 32, "heads": 4, "mlp_width": 64, "vocabulary": 60, "end_token": 59}
    config = TINY_TEXT if name is None else text_preset(name, 24).model_copy(update=narrow)
    model = scrambled(config)
    theirs = CLIPTextModelWithProjection(CLIPTextConfig(**hf_text.text_config_there(config))).eval()
    theirs.load_state_dict({**hf_text.tensors_there(config, model.state_dict())})
    ids = tokens(config, lengths=(4, 9, config.context))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).text_embeds, rtol=1e-5, atol=1e-5)


def test_presets_are_clips():
    with torch.device("meta"):
        model = TextTransformer(text_preset("text_b", 512))
    config = model.config
    assert (config.context, config.vocabulary, config.end_token) == (77, 49_408, 49_407)
    assert sum(parameter.numel() for parameter in model.parameters()) == 63_428_096  # of CLIP ViT-B/32's text side
    assert (text_preset("text_l", 768).width, text_preset("text_l", 768).heads) == (768, 12)
    with pytest.raises(ConfigError, match="no text preset named 'text_bb'. Did you mean text_b"):
        text_preset("text_bb", 512)


def test_nothing_behind_the_end_token_and_nothing_later_counts():
    model, ids = scrambled(TINY_TEXT), tokens(TINY_TEXT)
    changed = ids.clone()
    changed[0, 4:] = 7
    with torch.no_grad():
        before, after, short = model(ids), model(changed), model(ids[:, :9])
    torch.testing.assert_close(before, after)
    torch.testing.assert_close(before[:2], short[:2])


def test_checkpointing_changes_no_gradient():
    model, ids = scrambled(TINY_TEXT), tokens(TINY_TEXT)

    def gradients(runner):
        model.set_checkpointing(runner)
        model.zero_grad()
        model(ids).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients(None)
    for one, other in zip(plain, gradients(lambda block, *x: checkpoint(block, *x, use_reentrant=False)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_locked_image_tower_has_no_gradient_and_no_decay():
    def both(locked):
        return ImageTextModel(VisionTransformer(TINY, seed=0), TextTransformer(TINY_TEXT, seed=0), locked)

    model = both(locked=True).train()
    assert not model.image.training and model.text.training
    image, text, scale = model(images(TINY), tokens(TINY_TEXT))
    assert not image.requires_grad and text.requires_grad and scale.item() == pytest.approx(1 / 0.07)
    (text.sum() + scale.sum()).backward()
    assert all(parameter.grad is None for parameter in model.image.parameters())
    assert all(parameter.grad is not None for parameter in model.text.parameters())
    for locked in (True, False):
        model = both(locked)
        decaying, others = decay_groups(model, 0.2)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        assert "log_scale" in {names[id(p)] for p in others["params"]}
        assert "text.embeddings.tokens.weight" in {names[id(p)] for p in decaying["params"]}
        own = {names[id(p)].split(".")[0] for group in (decaying, others) for p in group["params"]}
        assert own == {"text", "log_scale"} | (set() if locked else {"image"})
    with pytest.raises(ConfigError, match="20 dimensions, the text tower in 24"):
        wider = TINY_TEXT.model_copy(update={"embed_dim": 24})
        ImageTextModel(VisionTransformer(TINY, seed=0), TextTransformer(wider, seed=0))


def test_the_scale_stops_at_its_bound_and_comes_back():
    model = ImageTextModel(VisionTransformer(TINY, seed=0), TextTransformer(TINY_TEXT, seed=0))
    with torch.no_grad():
        model.log_scale.fill_(5.0)
    for push, gradient in ((-1.0, 0.0), (1.0, MAX_SCALE)):  # a descent step would raise it, lower it
        model.log_scale.grad = None
        *_, scale = model(images(TINY), tokens(TINY_TEXT))
        assert scale.item() == MAX_SCALE
        (push * scale).sum().backward()
        assert model.log_scale.grad.item() == gradient


# ---------------------------------------------------------------------------------------------- captions, tokenizers


def test_a_trained_tokenizer_spells_anything_and_ends_every_text(tmp_path):
    tokenizer = train_tokenizer(CAPTIONS * 3, 600, tmp_path / "own.json")
    assert tokenizer.vocabulary <= 600 and tokenizer.end_token == tokenizer.vocabulary - 1
    row = tokenizer.encode("a  red\n BOAT", 8)
    assert row.tolist() == [tokenizer.end_token - 1, *row[1:4], *[tokenizer.end_token] * 4]
    assert (row == tokenizer.encode("A red boat", 8)).all()
    spelt = tokenizer.backend.encode("xq ß 🚀 z").tokens[1:-1]
    assert sum(len(token.removesuffix("</w>")) for token in spelt) == len("xqß🚀z".encode())
    cut = tokenizer.encode(" ".join(CAPTIONS), 8)
    assert len(cut) == 8 and cut[-1] == tokenizer.end_token and (cut[1:-1] != tokenizer.end_token).all()
    assert CaptionTokenizer.load(tmp_path / "own.json").hash == tokenizer.hash
    with pytest.raises(DataError, match="no caption to train"):
        train_tokenizer(["", " "], 600, tmp_path / "none.json")
    with pytest.raises(ConfigError, match="--vocab_size 100 has no room for 512 bytes"):
        train_tokenizer(CAPTIONS, 100, tmp_path / "small.json")
    assert not (tmp_path / "none.json").exists() and not (tmp_path / "small.json").exists()


def test_a_folder_of_transformers_gives_the_ids_that_transformers_gives(tmp_path):
    from transformers import CLIPTokenizerFast

    own = train_tokenizer(CAPTIONS * 3, 600, tmp_path / "own.json")
    import json

    model = json.loads(own.text)["model"]
    entries = {**model["vocab"], "<|startoftext|>": own.end_token - 1, "<|endoftext|>": own.end_token}
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "vocab.json").write_text(json.dumps(entries))
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])])
    (tmp_path / "clip" / "merges.txt").write_text(merges)
    loaded = CaptionTokenizer.load(tmp_path / "clip")
    theirs = CLIPTokenizerFast.from_pretrained(tmp_path / "clip")
    for text in CAPTIONS:
        ids = theirs(text)["input_ids"]
        assert loaded.encode(text, len(ids)).tolist() == own.encode(text, len(ids)).tolist() == ids
    theirs.save_pretrained(tmp_path / "saved")
    assert CaptionTokenizer.load(tmp_path / "saved").encode(CAPTIONS[1], 20).tolist() == loaded.encode(
        CAPTIONS[1], 20
    ).tolist()  # fmt: skip


def test_the_same_captions_give_the_same_tokenizer(tmp_path):
    captions = [
        f"a picture of {number} {kind}" for number in ("one", "two", "ten") for kind in ("ships", "cats", "deer")
    ]
    files = [tmp_path / f"{attempt}.json" for attempt in range(4)]
    for file in files:
        train_tokenizer(captions, 560, file)
    assert len({file.read_bytes() for file in files}) == 1


def test_what_is_no_tokenizer_is_refused_with_the_cure(tmp_path):
    with pytest.raises(DataError, match="does not exist, and nothing is downloaded.*train_tokenizer.py"):
        CaptionTokenizer.load(tmp_path / "absent.json")
    with pytest.raises(DataError, match=r"holds no tokenizer.json and no vocab.json"):
        CaptionTokenizer.load(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match=r"other.json: it is no tokenizer"):
        CaptionTokenizer.load(tmp_path / "other.json")
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "endless.json"))
    with pytest.raises(DataError, match="do not end with a token of their own"):
        CaptionTokenizer.load(tmp_path / "endless.json")


def test_captions_are_read_from_texts_and_records(tmp_path):
    assert read_caption("txt", b" a boat \n") == "a boat"
    assert read_caption("json", b'{"caption": "a boat"}') == "a boat"
    for extension, data, reason in (
        ("txt", b" \n", "no_caption"),
        ("txt", b"\xff\xfe", "bad_caption"),
        ("json", b"{", "bad_caption"),
        ("json", b'{"caption": null}', "no_caption"),
        ("json", b'{"caption": 3}', "bad_caption"),
        ("json", b"[]", "no_caption"),
        ("json", b"[" * 100_000, "bad_caption"),
    ):
        with pytest.raises(CaptionError) as raised:
            read_caption(extension, data)
        assert raised.value.reason == reason
    image = picture(0)
    parts = [{"txt": b"one"}, {}, {"json": b'{"caption": "two"}'}, {"txt": b""}, {"txt": b"three", "json": b"{"}]
    write_tar(tmp_path / "0.tar", ((f"{i}", {"jpg": image, **part}) for i, part in enumerate(parts)))
    assert list(captions_of([str(tmp_path / "0.tar")], None)) == ["one", "two", "three"]
    assert list(captions_of([str(tmp_path / "0.tar")], None, limit=2)) == ["one", "two"]


def test_captions_arrive_with_their_images_whatever_the_number_of_ranks_and_workers(tmp_path):
    shards = []
    for shard, count in enumerate((9, 8)):
        shards.append(str(tmp_path / f"{shard}.tar"))
        texts = [{"txt": CAPTIONS[row % 4].encode()} if (shard, row) != (1, 2) else {} for row in range(count)]
        write_tar(shards[-1], ((f"{shard}{row}", {"jpg": picture(row), **text}) for row, text in enumerate(texts)))
    tokenizer = train_tokenizer(CAPTIONS, 600, tmp_path / "own.json")
    paths = {"deepspeed_config": "x", "shards": "x", "output_dir": "x", "objective": "clip", "tokenizer": "x"}
    table = build_shard_table(shards, (), 8, 0.1, None, Topology.single(), captions=True)
    plan = EpochPlan(0, table.counts, 4, 16)
    assert "1 images have no caption: they are skipped, and counted, in every epoch" in table.unused()

    def rows(world_size, workers):
        found = []
        for rank in range(world_size):
            topology = Topology(rank, world_size, rank, world_size, torch.device("cpu"))
            config = RunConfig(**paths, workers=workers)
            loader = ImageLabelLoader(config, table, plan, 32, topology, tokenizer=tokenizer, context=12)
            found.append([batch for batch in loader.iterate(0, 8)])
            loader.close()
            ledger = loader.ledger
            assert ledger.read == 8 * 4 // world_size and set(ledger.skipped) <= {"no_caption"}
        return [
            (key, tokens.tolist(), image.sum().item())
            for step in range(8)
            for own in found
            for key, tokens, image in zip(own[step].keys, own[step].labels_BL, own[step].images_BCHH, strict=True)
        ]

    first = rows(1, 0)
    assert first == rows(2, 0) == rows(1, 2)
    for key, ids, _ in first:
        expected = tokenizer.encode(CAPTIONS[int(key[1:]) % 4], 12).tolist() if key else [NO_IMAGE] * 12
        assert ids == expected
    assert {key for key, *_ in first} >= {"", *(f"0{row}" for row in range(9))}
    with pytest.raises(DataError, match="1 of 17 images have no caption .*1.tar: 1 of 8, e.g. 12"):
        build_shard_table(shards, (), 8, 0.0, None, Topology.single(), captions=True)
