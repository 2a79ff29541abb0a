"""Validation of settings and their YAML round trip."""

import pytest
import yaml

from dwp_pyro.config.data import data_root
from dwp_pyro.config.names import FAMILIES
from dwp_pyro.config.prediction import PredictConfig
from dwp_pyro.config.training import FinetuneConfig, FitPriorConfig, SviConfig
from dwp_pyro.runtime.errors import ConfigError


@pytest.mark.parametrize("config", [FitPriorConfig, SviConfig, FinetuneConfig, PredictConfig])
def test_defaults_survive_yaml(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config().to_mapping()))
    assert config.from_yaml(path) == config()


def test_changes_override_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("steps: 7\nbatch-size: 3\nlearning_rate: 1\n")
    config = SviConfig.from_yaml(path, steps=9)
    assert (config.steps, config.batch_size, config.learning_rate) == (9, 3, 1.0)


def test_modalities_have_common_names():
    assert SviConfig(modality=("FLAIR", "T1w", "t1_gd", "CT")).modality == ("flair", "t1", "t1ce", "ct")


def test_lists_and_numbers_as_yaml_reads_them():
    assert SviConfig(widths=[4, 4, 8, 8]).widths == (4, 4, 8, 8)
    assert SviConfig.from_mapping({"learning-rate": "1e-3", "prior-scale": "2e0"}) == SviConfig(
        learning_rate=0.001, prior_scale=2.0
    )


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"learning_rate": "fast"}, "learning-rate: expected a number, got 'fast'"),
        ({"stepz": 3}, "'stepz' is not a setting"),
        ({"steps": 0}, "steps: must be at least 1"),
        ({"steps": 2.5}, "steps: expected a whole number, got 2.5"),
        ({"steps": True}, "steps: expected a whole number"),
        ({"learning_rate": float("nan")}, "learning-rate: must be a number of at most 1e\\+15, got nan"),
        ({"learning_rate": float("inf")}, "learning-rate: must be a number of at most"),
        ({"steps": 10**400}, "steps: must be a number of at most"),
        ({"steps": -(10**400)}, "steps: must be a number of at most"),
        ({"steps": "x" * 1000}, "steps: expected a whole number, got 'xx.{,30}'$"),
        ({"widths": [10**9, 2, 2, 2]}, "widths: must be at most 4096"),
        ({"prior": "cauchy"}, "'cauchy' is not one of dwp, gaussian, mixture, flow, isotropic, normal, he, .*"),
        ({"modality": 3}, "modality: expected a list"),
        ({"modality": ["flair", "flair"]}, "modality: has a duplicate"),
        ({"modality": ["flair", "T2-FLAIR"]}, "modality: has a duplicate"),
        ({"modality": ["flair", "_"]}, "modality: has an empty name"),
        ({"widths": [8, 16]}, "four numbers"),
        ({"widths": "8,x"}, "widths: expected a list, each a whole number, got '8,x'"),
        ({"spacing": -1.0}, "spacing: must be at least 0"),
        ({"spacing": 1000.0}, "spacing: must be a number of mm below 1000"),
        ({"mirror": ["none", "x"]}, "mirror: 'none' excludes other axes"),
        ({"mirror": ["w"]}, "mirror: 'w' is not one of x, y, z, none"),
        ({"learning_rate": 10**400}, "learning-rate: must be a number of at most 1e\\+15"),
        ({"likelihood": "categorical", "dice_weight": 0.9}, "dice-weight: is a setting of dice-ce"),
        ({"dice_weight": 1.5}, "dice-weight: must be at most 1"),
        ({"anneal": 1.5}, "anneal: must be at most 1"),
        ({"prior": "flow", "particles": 2}, "'flow' is not a VAE"),
        ({"prior": "normal", "train_reverse_model": True}, "'normal' is not a VAE"),
        ({"center": "target"}, "'target' is not one of source, none"),
        ({"prior_scale": 0.0}, "prior-scale: must be at least"),
        ({"prior": "log-uniform", "center": "source"}, "log-uniform has no center and no scale"),
        ({"prior": "log-uniform", "prior_scale": 2.0}, "log-uniform has no center and no scale"),
    ],
)
def test_bad_settings_are_named(values, says):
    with pytest.raises(ConfigError, match=says):
        SviConfig.from_mapping(values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"delta": 1e-9}, "delta, clip: are settings of a private prior"),
        ({"kernels": "kernels.npy", "root": "data/ms"}, "kernels: are fitted without scans; omit root"),
        ({"hidden": [4096, 4096]}, "latent-size and all hidden widths together must not exceed 8192"),
    ],
)
def test_settings_of_a_prior_that_do_not_fit(values, says):
    with pytest.raises(ConfigError, match=says):
        FitPriorConfig.from_mapping(values)


def test_text_in_a_file_is_read_as_that_of_the_option(tmp_path):
    lines = ("label-map: 1=oedema, 2=necrosis", "region: whole", "modality: flair, t1", "mirror: x,y")
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    config = FitPriorConfig.from_yaml(tmp_path / "config.yaml", widths="8, 16,32,64")
    assert config.label_map == ("1=oedema", "2=necrosis") and config.region == ("whole",)
    assert config.modality == ("flair", "t1") and config.mirror == ("x", "y") and config.widths == (8, 16, 32, 64)
    assert FitPriorConfig.from_mapping({"more_roots": "a,b"}).more_roots == ("a,b",)  # a path


def test_a_setting_that_is_there_twice_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("steps: 3\nn: 2\nsteps: 4\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: is not valid YAML \('steps' is there twice\)"):
        SviConfig.from_yaml(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("batch-size: 3\nbatch_size: 4\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: 'batch_size' is given twice, with a dash and with"):
        SviConfig.from_yaml(tmp_path / "config.yaml")


def test_a_change_that_does_not_fit_is_not_blamed_on_the_file(tmp_path):
    (tmp_path / "config.yaml").write_text("batch-size: 3\n")
    with pytest.raises(ConfigError, match=r"^batch-size: must be at least 1"):
        SviConfig.from_yaml(tmp_path / "config.yaml", batch_size=0)
    (tmp_path / "config.yaml").write_text("batch-size: 0\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: batch-size: must be at least 1"):
        SviConfig.from_yaml(tmp_path / "config.yaml", steps=2)


def test_a_bad_file_is_named(tmp_path):
    for content in ("- 1", "a: [", "!!python/object/apply:os.system ['true']"):
        path = tmp_path / "config.yaml"
        path.write_text(content)
        with pytest.raises(ConfigError, match="config.yaml"):
            SviConfig.from_yaml(path)


@pytest.mark.parametrize("init", ["random", "prior"])
@pytest.mark.parametrize("setting", [{"trainable": "first-last"}, {"l2_sp": 1.0}], ids=str)
def test_first_last_and_l2_sp_need_a_source(init, setting):
    with pytest.raises(ConfigError, match="needs init 'source'"):
        FinetuneConfig(init=init, **setting)
    FinetuneConfig(init="source", **setting)


def test_families_that_can_be_fitted():
    for family in (*FAMILIES, "auto"):
        assert FitPriorConfig.from_mapping({"family": family}).family == family
    with pytest.raises(ConfigError, match="family: 'isotropic' is not one of"):
        FitPriorConfig.from_mapping({"family": "isotropic"})


def test_folder_of_a_dataset(monkeypatch):
    monkeypatch.delenv("DWP_PYRO_DATA", raising=False)
    assert str(data_root("ms", None)) == "data/ms"
    monkeypatch.setenv("DWP_PYRO_DATA", "/scans")
    assert str(data_root("ms", None)) == "/scans/ms"
    assert str(data_root("ms", "here")) == "here"


def test_defaults_of_svi_that_depend_on_the_prior():
    """A learned prior is centered on the source network and starts there; explicit settings are kept."""
    dwp, normal = SviConfig().resolve(), SviConfig(prior="normal").resolve()
    assert (dwp.center, dwp.init, dwp.members) == ("source", "source", 3)
    assert (normal.center, normal.init, normal.members) == ("none", "random", 1)
    uncentered = SviConfig(center="none").resolve()
    assert (uncentered.center, uncentered.init, uncentered.prior_scale) == ("none", "prior", None)
    assert SviConfig(init="prior", prior_scale=2.0).resolve().init == "prior"
