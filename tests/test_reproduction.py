"""The reproduction: its table, and a folder that is gone on with by other settings."""

import pytest

from mlcd_ds.config import ReproduceConfig
from mlcd_ds.errors import ConfigError, DataError
from mlcd_ds.evaluation.reproduction import Column, Stages, table


def test_the_table_has_means_and_spreads_and_leaves_out_what_a_row_lacks():
    columns = [Column("a", "x", "y"), Column("b", "x", "z")]
    found = table({"mlcd": [{"a": 0.5, "b": 0.2}, {"a": 0.7, "b": 0.2}], "untrained": [{"a": 0.1}]}, columns)
    assert found.splitlines() == [
        "| | a | b | seeds |",
        "|---|---|---|---|",
        "| mlcd | 60.0 ± 14.1 | 20.0 ± 0.0 | 2 |",
        "| untrained | 10.0 |  | 1 |",
    ]


def test_a_folder_keeps_its_settings_and_takes_more_seeds(tmp_path):
    def stages(**changed):
        return Stages(ReproduceConfig(root="data", output_dir=str(tmp_path), **changed))

    stages(steps=40).claim()
    stages(steps=40, seeds=5, ablations=False).claim()
    with pytest.raises(ConfigError, match="was begun with other settings .*steps.*choose another --output_dir"):
        stages(steps=80).claim()
    with pytest.raises(DataError, match="no tars in data/scenes64/train"):
        stages().check_data()
