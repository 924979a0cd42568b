"""Damaged tars and label files; `tools/soak_mutations.py` does thousands of them."""

import numpy as np

from mlcd_ds.benchmarks.mutations import KINDS, Mutations, mutated


def test_300_damaged_files_end_well(tmp_path):
    mutations = Mutations(tmp_path, seed=1)
    for number in range(300):
        mutations.run(number)
    assert mutations.outcomes.total() == 300
    ends = {end for _, _, end in mutations.outcomes}
    assert {"refused", "counted skip"} <= ends  # both ways out are taken
    assert {end for file, _, end in mutations.outcomes if file == "labels"} <= {
        "refused",
        "read as written",
        "as it was",
    }


def test_damage_is_a_function_of_its_seed_and_does_damage():
    data = bytes(range(256)) * 40
    for kind in KINDS:
        copies = [mutated(data, kind, np.random.default_rng(seed)) for seed in range(40)]
        assert copies == [mutated(data, kind, np.random.default_rng(seed)) for seed in range(40)]
        assert (len(set(copies)) > 35 and data not in copies[:20]) or kind == "splice"
