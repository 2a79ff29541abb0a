"""Arbitrary files and settings give a value or a one-line error. More mutants: `python -m tests.robustness.fuzz`."""

from __future__ import annotations

import math
import tempfile
from dataclasses import fields
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from dwp_pyro.config.prediction import PredictConfig
from dwp_pyro.config.training import FinetuneConfig, FitPriorConfig, SviConfig
from dwp_pyro.data.case import Case, read_case, read_volume
from dwp_pyro.data.modalities import modality_name
from dwp_pyro.data.preprocessing import Preprocessing
from dwp_pyro.data.regions import parse_label_map, structure
from dwp_pyro.prediction.outputs import save_like
from dwp_pyro.runtime.errors import ConfigError
from tests.robustness.fuzz import fuzz, make_files

pytestmark = pytest.mark.slow

MUTANTS = 400

reproducible = settings(
    derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck), database=None
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
values = st.recursive(scalars, lambda items: st.lists(items, max_size=4) | st.dictionaries(st.text(max_size=3), items))


def test_mutated_files(tmp_path):
    make_files(tmp_path)
    result = fuzz(tmp_path, range(MUTANTS))
    assert not result.findings, [finding[:3] for finding in result.findings]
    assert sum(count for counts in result.counts.values() for count in counts.values()) == MUTANTS
    assert sum(counts["refused"] for counts in result.counts.values()) > MUTANTS / 4


@pytest.mark.parametrize("config_type", [SviConfig, FinetuneConfig, FitPriorConfig, PredictConfig])
def test_settings_of_any_value_are_accepted_or_give_a_one_line_error(config_type):
    names = st.sampled_from([field.name for field in fields(config_type)]) | st.text(max_size=9)

    @reproducible
    @given(st.dictionaries(names, values, max_size=4))
    def check(mapping):
        try:
            config = config_type.from_mapping(mapping)
        except ConfigError as error:
            assert "\n" not in " ".join(str(error).split())
        else:
            assert config_type.from_mapping(config.to_mapping()) == config or any(
                isinstance(value, float) and math.isnan(value) for value in mapping.values()
            )

    check()


@reproducible
@given(st.text(max_size=30))
def test_names_of_structures_and_modalities_are_valid_in_file_names(name):
    plain = modality_name(name)
    assert plain == "" or plain.isalnum()
    assert modality_name(plain) == plain
    try:
        known = structure(name)
    except ConfigError as error:
        assert "has no letter or digit" in str(error)
    else:
        assert structure(known) == known and all(part.isalnum() for part in known.split("-"))
        assert set(parse_label_map([f"1={name}"]).values()) == {known}


@st.composite
def grids(draw):
    """Return a shape and an affine with rotation, reflections and anisotropic spacing."""
    shape = tuple(draw(st.integers(2, 9)) for _ in range(3))
    rotation = Rotation.from_euler("xyz", [draw(st.integers(-180, 180)) for _ in range(3)], degrees=True).as_matrix()
    spacing = [draw(st.floats(0.4, 4)) * draw(st.sampled_from([-1, 1])) for _ in range(3)]
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing
    affine[:3, 3] = [draw(st.floats(-200, 200)) for _ in range(3)]
    return shape, affine


@reproducible
@given(
    grids(),
    st.sampled_from([np.uint8, np.int16, np.float32, np.float64]),
    st.sampled_from([None, 1.0, 2.5]),
    st.sampled_from([".nii", ".nii.gz"]),
)
def test_maps_return_to_the_grid_of_any_scan(grid, dtype, spacing, suffix):
    shape, affine = grid
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, f"ä b{suffix}")
        nibabel.save(nibabel.Nifti1Image(rng.integers(1, 100, shape).astype(dtype), affine), image)
        scan = read_case(Case("a", {"flair": image}), ["flair"], {})
        assert scan.images.shape == (1, *shape) and np.allclose(scan.affine, affine, atol=1e-3)
        preprocess = Preprocessing(spacing)
        example = preprocess(scan, [])
        maps = preprocess.invert(torch.ones(2, *example.image.shape[1:]), example, scan)
        assert maps.shape == (2, *shape) and np.isfinite(maps).all()
        written = Path(folder, "map.nii.gz")
        save_like(image, maps[0], written)
        again = read_volume(written)
        assert np.array_equal(again.data, maps[0]) and np.allclose(again.affine, scan.affine, atol=1e-4)
