"""tools/bench.py step: the same steps for ours and transformers' encoder, complete numbers. No times are judged."""

import json
import math

import pytest
from processes import ROOT, run_script
from test_bench import numbers

from mlcd_ds.benchmarks.step import check_several, fake_batch, settings_of
from mlcd_ds.config import BenchStepConfig
from mlcd_ds.errors import ConfigError

TINY = ["--presets=vit_toy", "--micro_batches=4", "--classes=400", "--repeats=1", "--threads=1"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_writes_every_line_and_no_path(tmp_path, ranks):
    output = tmp_path / "step.json"
    real = (
        ["--data=real", "--real_steps=1", "--workers=0", "--checkpointing=none,all"]
        if ranks == 1
        else ["--zero_stages=3"]
    )
    ended = run_script(ranks, [ROOT / "tools" / "bench.py", "step", *TINY, *real, f"--output={output}"])
    assert [rank.code for rank in ended] == [0] * ranks, ended[0].output[-3000:]
    text = output.read_text()
    assert str(tmp_path) not in text and str(ROOT) not in text
    result = json.loads(text)
    assert result["ranks"] == ranks and result["command"].startswith("python tools/bench.py step --presets vit_toy")
    assert all(math.isfinite(number) for number in numbers(result))
    rows = {row["setting"]: row for row in result["steps"]}
    stage = 1 if ranks == 1 else 3
    names = [f"ours_vit_toy_B4_zero{stage}_none", f"transformers_vit_toy_B4_zero{stage}_none"]
    assert set(rows) == set(names) | ({"ours_vit_toy_B4_zero1_all"} if ranks == 1 else set())
    ours, theirs = (rows[name] for name in names)
    assert theirs["first_loss"] == pytest.approx(ours["first_loss"], rel=1e-4)
    for row in rows.values():
        assert row["images_per_second"] == pytest.approx(4 * ranks / row["seconds"]["min"])
        assert row["mfu"] == pytest.approx(row["encoder_flops"] / row["seconds"]["min"] / row["peak_flops_per_second"])
        assert 0 < row["head_share"] < 1 and row["seconds"]["min"] > 0
        assert row["setting"] in ended[0].output
    assert ours["per_transformers"] == pytest.approx(theirs["seconds"]["min"] / ours["seconds"]["min"])
    if ranks == 1:
        (real_row,) = result["data"]
        assert real_row["real_per_fake"] == pytest.approx(
            real_row["real_images_per_second"] / real_row["fake_images_per_second"]
        )
    else:
        assert "setting" not in ended[1].output  # rank 0 alone tells


def test_every_combination_is_a_line_of_its_group():
    config = BenchStepConfig(presets="vit_toy,vit_bigg14", micro_batches=(2, 4), checkpointing="none,6", compile="both")
    groups = [[str(setting) for setting in group] for group in settings_of(config)]
    assert len(groups) == 4
    ours = [f"ours_vit_toy_B2_zero1_{kept}{compiled}" for kept in ("none", "6") for compiled in ("", "_compile")]
    assert groups[0] == [*ours, "transformers_vit_toy_B2_zero1_none"]
    assert len(groups[2]) == 4  # transformers' CLIP has no rotary positions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpointing": "none,some"}, "--checkpointing 'some': expected none, all, selective or a number"),
        ({"presets": "vit_x"}, "vit_x"),
    ],
)
def test_lists_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        settings_of(BenchStepConfig(**changes))


@pytest.mark.parametrize("changes", [{"memory": True}, {"data": "real"}])
def test_what_one_rank_alone_can_measure_is_refused_on_several(changes):
    with pytest.raises(ConfigError, match="one rank"):
        check_several(BenchStepConfig(**changes))


def test_every_rank_has_other_images_and_all_labels_of_one_differ():
    first, second = (fake_batch(8, 3, 80, BenchStepConfig(), rank) for rank in (0, 1))
    assert not first.images_BCHH.equal(second.images_BCHH)
    assert all(len(set(row.tolist())) == 8 and max(row) < 80 for row in first.labels_BL)
