"""What is in stores is said, and the block that is given for them works."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from credit.checks.parity import model_shape
from credit.cli import main
from credit.config import load_config, parse_config
from credit.data.describe import describe
from credit.data.prepare import write_statistics
from credit.errors import DataError
from tests.stores import conf, dataset, write_zarr
from tests.training.runs import curve


def test_the_block_of_a_store_can_be_trained_with(tmp_path, capsys) -> None:
    data = dataset(levels=(500.0, 850.0))
    data["only_here"] = data.a.where(data.latitude < 80)
    data["rows"] = data.latitude * 2
    path = write_zarr(tmp_path / "s.zarr", data)
    assert main(["data", "describe", str(path)]) == 0
    said = capsys.readouterr().out
    assert "13 x 16, latitudes of 13 values, 90 to -90, longitudes of 16 values, 0 to 337.5" in said
    assert "40 times, 2020-01-01T00:00 to 2020-01-10T18:00 every 6h" in said
    assert "only_here" in said
    assert "only_here is nan at 2020-01-01T00:00, latitude 90" in said
    assert "rows " in said
    assert "(not a field)" in said
    block = yaml.safe_load(said[said.index("data:\n") :])["data"]
    assert sorted(block["variables"]) == ["a", "b", "c"]
    assert block["levels"] == [500, 850]
    assert block["statics"] == ["orography", "sin_latitude", "cos_latitude"]
    raw = conf(tmp_path / "run", path, epochs=1)
    raw["data"] = block
    raw["forecast"] = {"lead": "6h"}
    write_statistics(parse_config(raw))
    losses, valid, _ = curve(raw)
    assert np.isfinite([*losses, valid]).all()


def test_what_cannot_be_used_is_said_beside_what_can(tmp_path) -> None:
    data = dataset(states=9)
    data.isel(time=[0, 1, 2, 5, 6, 7, 8]).to_netcdf(tmp_path / "a.nc")
    data.isel(longitude=[0, 1, 2, 5, 6]).to_netcdf(tmp_path / "b.nc")
    said = describe([str(tmp_path / "*.nc")])
    assert f"not usable: {tmp_path / 'b.nc'}: longitudes must be regular and close the circle" in said
    assert "7 times, 2020-01-01T00:00 to 2020-01-03T00:00 every 6h, 1 times further apart" in said
    assert "gaps: skip" in said
    with pytest.raises(DataError, match="not usable"):
        describe([str(tmp_path / "b.nc")])


def test_a_mesh_is_planned_where_the_data_are_not(capsys) -> None:
    config = load_config("configs/wxformer_0p25deg.yaml")
    assert model_shape(config) == (5 * 13 + 4 + 7, 5 * 13 + 4, (721, 1440))
    small = ["--set", "data.levels=[500]", "--set", "model={name: unet, width: 8, levels: 1}"]
    small += ["--set", "data.statics=[]", "--set", "data.path=nowhere.zarr"]
    command = ["plan", "configs/wxformer_0p25deg.yaml", "--gpus", "2", "--gpu-memory", "40", "--grid", "19x36", *small]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "assumed, as nowhere.zarr is not here: 19 x 36, " in said
    assert "Recommended" in said
