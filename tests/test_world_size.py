"""Going on at another number of ranks: weights, centers, moments, counts and settings exactly, samples each once."""

import pytest
import torch
from processes import ROOT, run_script
from world_size_worker import STAGES


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    """{chain: [what rank 0 had in each act]}."""
    folder = tmp_path_factory.mktemp("chains")
    (ended,) = run_script(1, [ROOT / "tests" / "world_size_worker.py", folder], timeout=600)
    assert ended.code == 0, ended.output[-3000:]
    return {
        name: [torch.load(folder / name / f"act{number}_rank0.pt", weights_only=True) for number in range(len(stages))]
        for name, stages in STAGES.items()
    }


def assert_same(found, expected, name):
    assert type(found) is type(expected), name
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for key in expected:
            assert_same(found[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
    else:
        assert found == expected, name


@pytest.mark.parametrize("name", STAGES)
def test_every_part_of_the_state_is_the_same_right_after_loading(acts, name):
    """2 -> 1 -> 2 -> 3 -> 2 ranks, at ZeRO 0 to 3 and from stage to stage: bit for bit."""
    for number in range(1, len(acts[name])):
        loaded, saved = acts[name][number]["loaded"], acts[name][number - 1]["saved"]
        for part in saved:
            assert_same(loaded[part], saved[part], f"{name}, act {number}: {part}")
        assert saved["exp_avg"].keys() == saved["encoder"].keys()
        assert all(saved["exp_avg_sq"][parameter].any() for parameter in saved["exp_avg_sq"])
