"""Detection and reading of layouts in generated folders."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest

from dwp_pyro.config.data import DATASETS
from dwp_pyro.data.case import read_case
from dwp_pyro.data.layouts import LAYOUTS, detect_layouts, open_dataset
from dwp_pyro.data.modalities import modality_name
from dwp_pyro.runtime.errors import DataError, LabelsUnknown


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def underscored(root: Path, case: str, suffix: str = ".nii.gz", label: bool = True) -> None:
    name = Path(case).name
    touch(root, *(f"{case}/{name}_{m}{suffix}" for m in ("flair", "t1", "t1ce", "t2", *(["seg"] if label else []))))


def hyphened(root: Path, case: str, label: bool = True) -> None:
    name = Path(case).name
    touch(root, *(f"{case}/{name}-{m}.nii.gz" for m in ("t1n", "t1c", "t2w", "t2f", *(["seg"] if label else []))))


def describe(root: Path, **content) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(content))


def msd(root: Path) -> None:
    touch(root, "imagesTr/BRATS_001.nii.gz", "imagesTr/._BRATS_001.nii.gz", "labelsTr/BRATS_001.nii.gz")
    touch(root, "imagesTs/BRATS_485.NII.GZ")  # extensions in any case
    describe(
        root,
        modality={"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        labels={"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
        training=[{"image": "./imagesTr/BRATS_001.nii.gz", "label": "./labelsTr/BRATS_001.nii.gz"}],
    )


NNUNET = {"channel_names": {"0": "T1", "1": "T2-FLAIR"}, "numTraining": 1, "file_ending": ".nii.gz"}


def nnunet(root: Path, labels: dict | None = None, ending: str = ".nii.gz") -> None:
    touch(root, *(f"imagesTr/P_1_000{i}{ending}" for i in (0, 1)), f"labelsTr/P_1{ending}")
    touch(root, *(f"imagesTs/P_2_000{i}{ending}" for i in (0, 1)))
    describe(root, **NNUNET | {"labels": labels or {"background": 0, "oedema": 1, "necrosis": 2, "enhancing": 3}})


def bids(root: Path) -> None:
    touch(root, *(f"sub-01/ses-1/anat/sub-01_ses-1_{m}.nii.gz" for m in ("T1w", "FLAIR", "ce-gd_T1w")))
    touch(root, "sub-02/anat/sub-02_T1w.nii.gz", "dataset_description.json")
    touch(root, "derivatives/manual/sub-01/ses-1/anat/sub-01_ses-1_label-lesion_mask.nii.gz")


def msseg(root: Path) -> None:
    for part in ("Training", "Testing"):
        patient = f"{part}/Center_01/Patient_01"
        touch(
            root, *(f"{patient}/Preprocessed_Data/{m}_preprocessed.nii.gz" for m in ("FLAIR", "T1", "T2", "DP", "GADO"))
        )
        touch(root, *(f"{patient}/Raw_Data/{m}.nii.gz" for m in ("FLAIR", "T1")))
        touch(root, *(f"{patient}/Masks/{m}.nii.gz" for m in ("Consensus", "ManualSegmentation_1", "Brain_Mask")))


def manifest(root: Path) -> None:
    touch(root, "a/f.nii.gz", "a/l.nii.gz", "a/b.nii.gz", "f2.nii.gz")
    (root / "scans.csv").write_text("id,FLAIR,label,brain\nA-1,a/f.nii.gz,a/l.nii.gz,a/b.nii.gz\n\nB,f2.nii.gz,,\n")


PATIENTS = {
    "isbi2015": {"training01_01": "training01", "training01_02": "training01"},
    "mslesseg": {"P1_T1": "P1", "P1_T2": "P1", "P54": "P54"},
    "bids": {"sub-01_ses-1": "sub-01", "sub-02": "sub-02"},
    "brats2023-gli": {"BraTS-GLI-00000-000": "BraTS-GLI-00000"},
    "brats2018": {"Brats18_A_1": "Brats18_A_1", "Brats18_B_1": "Brats18_B_1"},
}


@pytest.mark.parametrize("name", PATIENTS)
def test_visits_belong_to_one_patient(name, tmp_path):
    KNOWN[name][0](tmp_path)
    assert open_dataset(tmp_path).patients == PATIENTS[name]


def test_subjects_of_bids_may_hold_underscores(tmp_path):
    for name in ("MS_001", "MS_002"):
        touch(tmp_path, f"sub-{name}/ses-1/anat/sub-{name}_ses-1_FLAIR.nii.gz")
    assert set(open_dataset(tmp_path).patients.values()) == {"sub-MS_001", "sub-MS_002"}


def test_t2_star_is_not_t2():
    assert modality_name("T2*") == "t2star" and modality_name("T2w") == "t2"


def test_a_manifest_may_name_patients(tmp_path):
    touch(tmp_path, "a.nii.gz", "b.nii.gz", "c.nii.gz")
    (tmp_path / "scans.csv").write_text("id,patient,flair\nA1,A,a.nii.gz\nA2,A,b.nii.gz\nC,,c.nii.gz\n")
    data = open_dataset(tmp_path / "scans.csv")
    assert data.patients == {"A1": "A", "A2": "A", "C": "C"}
    assert [list(case.images) for case in data.cases] == [["flair"]] * 3


GLI = "ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData/BraTS-GLI-00000-000"
BRATS = ["flair", "t1", "t1ce", "t2"]
LESION = {1: "lesion"}
TUMOUR = {1: "necrosis", 2: "oedema", 4: "enhancing"}

#: Name → function that makes a data set, layout, sorted ids, modalities of the first case, labels, first region.
KNOWN: dict[str, tuple[Callable[[Path], object], str, list[str], list[str], dict[int, str], str]] = {
    "brats2018": (
        lambda root: (underscored(root, "HGG/Brats18_A_1"), underscored(root, "LGG/Brats18_B_1", label=False)),
        "brats", ["Brats18_A_1", "Brats18_B_1"], BRATS, TUMOUR, "whole",
    ),
    "brats2018 in its release": (
        lambda root: underscored(root, "MICCAI_BraTS_2018_Data_Training/HGG/Brats18_A_1"),
        "brats", ["Brats18_A_1"], BRATS, TUMOUR, "whole",
    ),
    "brats2019": (
        lambda root: underscored(root, "LGG/BraTS19_TCIA10_410_1", ".nii"),
        "brats", ["BraTS19_TCIA10_410_1"], BRATS, TUMOUR, "whole",
    ),
    "brats2020": (
        lambda root: (underscored(root, "BraTS20_Training_001", ".nii"), touch(root, "name_mapping.csv")),
        "brats", ["BraTS20_Training_001"], BRATS, TUMOUR, "whole",
    ),
    "brats2020 validation": (
        lambda root: underscored(root, "BraTS20_Validation_001", label=False),
        "brats", ["BraTS20_Validation_001"], BRATS, {}, "",
    ),
    "brats2021": (
        lambda root: underscored(root, "BraTS2021_00000"),
        "brats", ["BraTS2021_00000"], BRATS, TUMOUR, "whole",
    ),
    "brats2023-gli": (
        lambda root: hyphened(root, GLI),
        "brats2023-gli", ["BraTS-GLI-00000-000"], BRATS, {1: "necrosis", 2: "oedema", 3: "enhancing"}, "whole",
    ),
    "brats2024-gli": (
        lambda root: hyphened(root, "training_data1_v2/BraTS-GLI-00005-100"),
        "brats2024-gli", ["BraTS-GLI-00005-100"], BRATS,
        {1: "non-enhancing", 2: "oedema", 3: "enhancing", 4: "resection-cavity"}, "whole",
    ),
    "brats-ped": (
        lambda root: hyphened(root, "BraTS-PED-00002-000"),
        "brats-ped", ["BraTS-PED-00002-000"], BRATS,
        {1: "enhancing", 2: "non-enhancing", 3: "cystic-component", 4: "oedema"}, "whole",
    ),
    "openms": (
        lambda root: touch(root, *(f"patient01/{m}.nii.gz" for m in ("FLAIR", "T1W", "T1WKS", "T2W", "consensus_gt"))),
        "openms", ["patient01"], BRATS, LESION, "lesion",
    ),
    "openms with prefixes": (
        lambda root: touch(root, *(f"patient01/patient01_{m}.nii" for m in ("FLAIR", "T2W", "consensus_gt"))),
        "openms", ["patient01"], ["flair", "t2"], LESION, "lesion",
    ),
    "openms as released": (
        lambda root: touch(
            root, *(f"cross_sectional/coregistered/patient01/{m}.nii.gz" for m in ("FLAIR", "consensus_gt"))
        ),
        "openms", ["patient01"], ["flair"], LESION, "lesion",
    ),
    "msseg2016": (
        msseg, "msseg2016", ["Testing_Center_01_Patient_01", "Training_Center_01_Patient_01"],
        [*BRATS, "pd"], LESION, "lesion",
    ),
    "msseg2016 flat": (
        lambda root: touch(
            root, *(f"01016SACH/{m}.nii.gz" for m in ("3DFLAIR", "3DT1", "3DT1GADO", "T2", "DP", "Consensus"))
        ),
        "msseg2016", ["01016SACH"], [*BRATS, "pd"], LESION, "lesion",
    ),
    "isbi2015": (
        lambda root: touch(
            root,
            *(
                f"training/training01/preprocessed/training01_0{i}_{m}_pp.nii"
                for i in (1, 2)
                for m in ("flair", "mprage", "t2", "pd")
            ),
            *(f"training/training01/masks/training01_0{i}_mask{r}.nii" for i in (1, 2) for r in (1, 2)),
        ),
        "isbi2015", ["training01_01", "training01_02"], ["flair", "t1", "t2", "pd"], LESION, "lesion",
    ),
    "wmh2017": (
        lambda root: touch(
            root,
            *(f"Utrecht/0/{k}/{m}.nii.gz" for k in ("pre", "orig") for m in ("FLAIR", "T1")), "Utrecht/0/wmh.nii.gz",
            "Amsterdam/GE3T/100/pre/FLAIR.nii.gz", "Amsterdam/GE3T/100/wmh.nii.gz",
        ),
        "wmh2017", ["Amsterdam_GE3T_100", "Utrecht_0"], ["flair"], {1: "lesion", 2: "ignore"}, "lesion",
    ),
    "wmh2017 as released": (
        lambda root: touch(
            root,
            *(f"dataverse_files/training/{n}/pre/FLAIR.nii.gz" for n in ("Utrecht/0", "Amsterdam/GE3T/100")),
            *(f"dataverse_files/training/{n}/wmh.nii.gz" for n in ("Utrecht/0", "Amsterdam/GE3T/100")),
        ),
        "wmh2017", ["dataverse_files_training_Amsterdam_GE3T_100", "dataverse_files_training_Utrecht_0"],
        ["flair"], {1: "lesion", 2: "ignore"}, "lesion",
    ),
    "mslesseg": (
        lambda root: touch(
            root,
            *(f"train/P1/T{i}/P1_T{i}_{m}.nii.gz" for i in (1, 2) for m in ("FLAIR", "T1", "T2", "MASK")),
            "test/P54/P54_FLAIR.nii.gz",
        ),
        "mslesseg", ["P1_T1", "P1_T2", "P54"], ["flair", "t1", "t2"], LESION, "lesion",
    ),
    "bids": (bids, "bids", ["sub-01_ses-1", "sub-02"], ["flair", "t1", "t1ce"], LESION, "lesion"),
    "bids of atlas": (
        lambda root: touch(
            root,
            *(
                f"R001/sub-r001s001/ses-1/anat/sub-r001s001_ses-1_space-MNI152NLin2009aSym_{m}.nii.gz"
                for m in ("T1w", "label-L_desc-T1lesion_mask")
            ),
        ),
        "bids", ["sub-r001s001_ses-1"], ["t1"], LESION, "lesion",
    ),
    "bids of ivadomed": (
        lambda root: touch(
            root, "sub-x/anat/sub-x_T2w.nii.gz", "derivatives/labels/sub-x/anat/sub-x_T2w_lesion-manual.nii.gz",
            "derivatives/labels/sub-x/anat/sub-x_T2w_seg-manual.nii.gz",
        ),
        "bids", ["sub-x"], ["t2"], LESION, "lesion",
    ),
    "msd": (
        msd, "msd", ["BRATS_001", "BRATS_485"], BRATS, {1: "oedema", 2: "non-enhancing", 3: "enhancing"}, "whole",
    ),
    "msd numbered from 0": (
        lambda root: (
            touch(root, *(f"{kind}Tr/la_000{n}.nii.gz" for kind in ("images", "labels") for n in (0, 1))),
            describe(root, modality={"0": "FLAIR"}, labels={"0": "background", "1": "lesion"}),
        ),
        "msd", ["la_0000", "la_0001"], ["flair"], LESION, "lesion",
    ),
    "nnunet": (
        nnunet, "nnunet", ["P_1", "P_2"], ["t1", "flair"], {1: "oedema", 2: "necrosis", 3: "enhancing"}, "whole",
    ),
}  # fmt: skip


def test_the_command_line_knows_every_layout():
    assert set(DATASETS) == set(LAYOUTS)


@pytest.mark.parametrize("name", KNOWN)
def test_each_layout_is_detected_and_read(tmp_path, name):
    make, layout, ids, modalities, labels, region = KNOWN[name]
    make(tmp_path)
    assert set(detect_layouts(tmp_path)) == {layout}
    data = open_dataset(tmp_path)
    assert data.layout == layout
    assert [case.id for case in data.cases] == ids
    assert sorted(data.cases[0].images) == sorted(modalities)
    assert data.labels == labels
    assert next(iter(data.regions), "") == region
    assert bool(data.cases[0].label) == bool(labels)
    for case in data.cases:
        assert all(path.is_file() for path in (*case.images.values(), case.label, case.brain_mask) if path is not None)
    assert open_dataset(tmp_path, layout) == data


def test_a_subfolder_of_a_data_set_is_enough(tmp_path):
    """Folder of a grade, of a site, of the training cases."""
    underscored(tmp_path, "HGG/Brats18_A_1")
    msseg(tmp_path)
    touch(tmp_path, "Utrecht/0/pre/FLAIR.nii.gz")
    assert [case.id for case in open_dataset(tmp_path / "HGG").cases] == ["Brats18_A_1"]
    assert [case.id for case in open_dataset(tmp_path / "Training").cases] == ["Center_01_Patient_01"]
    assert [case.id for case in open_dataset(tmp_path / "Utrecht").cases] == ["0"]
    with pytest.raises(DataError, match=r"several layouts \(brats, msseg2016, wmh2017\); choose one"):
        open_dataset(tmp_path)
    assert open_dataset(tmp_path, "msseg2016").layout == "msseg2016"


def test_alternative_files_have_the_documented_priority(tmp_path):
    """First rater, consensus, preprocessed images, `pre` before `orig`, an unusual name, upper case."""
    for name in ("isbi2015", "msseg2016", "wmh2017", "mslesseg", "bids"):
        KNOWN[name][0](tmp_path / name)
    odd = "BraTS20_Training_355/W39_1998.09.19_Segm.nii"
    touch(tmp_path / "brats", "BraTS20_Training_355/BRATS20_TRAINING_355_FLAIR.NII", odd)
    cases = {
        name: open_dataset(tmp_path / name).cases for name in ("brats", "isbi2015", "msseg2016", "wmh2017", "bids")
    }
    assert cases["isbi2015"][0].label.name == "training01_01_mask1.nii"
    assert cases["msseg2016"][0].label.name == "Consensus.nii.gz"
    assert cases["msseg2016"][0].brain_mask.name == "Brain_Mask.nii.gz"
    assert cases["msseg2016"][0].images["t1ce"].name == "GADO_preprocessed.nii.gz"
    assert cases["wmh2017"][1].images["t1"].parent.name == "pre"
    assert cases["brats"][0].label == tmp_path / "brats" / odd
    assert cases["brats"][0].images["flair"].suffix == ".NII"
    assert cases["bids"][0].images["t1ce"].name == "sub-01_ses-1_ce-gd_T1w.nii.gz"
    assert cases["bids"][1].label is None


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("BraTS-GLI-00000", "brats2023-gli or brats2024-gli"),
        ("BraTS2023-GLI-TrainingData/BraTS-GLI-00000-100", "brats2023-gli or brats2024-gli"),
        ("BraTS2024-GLI-TrainingData/BraTS-GLI-00000-000", "brats2023-gli or brats2024-gli"),
    ],
)
def test_glioma_of_an_unknown_year_is_refused_until_its_labels_are_named(tmp_path, case, says):
    hyphened(tmp_path, case)
    with pytest.raises(LabelsUnknown, match="does not define the meaning of its label values") as caught:
        open_dataset(tmp_path)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert open_dataset(tmp_path, label_map={1: "necrosis", 3: "enhancing"}).labels == {1: "necrosis", 3: "enhancing"}
    assert open_dataset(tmp_path, "brats2024-gli").labels[4] == "resection-cavity"
    assert open_dataset(tmp_path, needs_labels=False).cases[0].label is None


def test_glioma_of_two_years_is_refused(tmp_path):
    hyphened(tmp_path, "BraTS-GLI-00000-000")
    hyphened(tmp_path, "BraTS-GLI-00001-100")
    with pytest.raises(DataError, match="may be brats2023-gli or brats2024-gli"):
        open_dataset(tmp_path)


def test_glioma_of_one_year_is_not_read_as_another(tmp_path):
    hyphened(tmp_path, "BraTS-GLI-00000-000")
    with pytest.raises(DataError, match="holds no case of the layout 'brats2024-gli'"):
        open_dataset(tmp_path, "brats2024-gli")


def without_description(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def make_without(root: Path) -> None:
        make(root)
        (root / "dataset.json").unlink()
        for path in root.glob("images*/*.nii.gz"):  # the header gives the number of MSD channels
            nibabel.save(nibabel.Nifti1Image(np.ones((2, 2, 2, 2), np.float32), np.eye(4)), path)

    return make_without


def segmentation_without_table(root: Path) -> None:
    touch(root, "sub-1/anat/sub-1_FLAIR.nii.gz", "derivatives/x/sub-1/anat/sub-1_dseg.nii.gz")


@pytest.mark.parametrize(
    ("make", "layout", "modalities"),
    [
        (without_description(msd), "msd", ["0", "1"]),
        (without_description(nnunet), "nnunet", ["0", "1"]),
        (segmentation_without_table, "bids", ["flair"]),
    ],
    ids=["msd", "nnunet", "bids"],
)
def test_labels_without_names_are_refused_until_they_are_named(tmp_path, make, layout, modalities):
    make(tmp_path)
    with pytest.raises(
        LabelsUnknown, match=rf"\({layout}\) does not define the meaning of its label values$"
    ) as caught:
        open_dataset(tmp_path)
    assert "\n" not in str(caught.value)
    data = open_dataset(tmp_path, label_map={1: "oedema", 2: "necrosis"})
    assert data.layout == layout and data.regions == {"whole": {1, 2}, "core": {2}}
    assert sorted(data.cases[0].images) == modalities


def test_a_label_map_overrides_the_names_of_the_layout(tmp_path):
    underscored(tmp_path, "HGG/Brats18_A_1")
    data = open_dataset(tmp_path, label_map={4: "ignore"})
    assert data.labels == {1: "necrosis", 2: "oedema", 4: "ignore"}
    assert data.regions == {"whole": {1, 2}, "core": {1}}


def test_regions_of_nnunet_are_used_as_defined(tmp_path):
    labels = {"background": 0, "whole tumor": [1, 2, 3], "Tumor Core": [2, 3], "enhancing tumor": 3, "ignore": 4}
    nnunet(tmp_path, labels)
    data = open_dataset(tmp_path)
    assert data.regions == {"whole": {1, 2, 3}, "core": {2, 3}, "enhancing": {3}}
    assert data.labels == {1: "label-1", 2: "label-2", 3: "label-3", 4: "ignore"}
    assert data.region_values(["core", "enhancing"]) == {"core": {2, 3}, "enhancing": {3}}


def test_files_of_nnunet_may_be_listed(tmp_path):
    touch(tmp_path, "../a.nii", "../b.nii", "m.nii")
    describe(
        tmp_path,
        **NNUNET | {"labels": {"lesion": 1}, "file_ending": ".nii"},
        dataset={"x": {"images": ["../a.nii", "../b.nii"], "label": "m.nii"}},
    )
    (case,) = open_dataset(tmp_path).cases
    assert case.images == {"t1": tmp_path / "../a.nii", "flair": tmp_path / "../b.nii"}
    assert case.label == tmp_path / "m.nii"
    describe(tmp_path, **NNUNET, dataset={"../x": {"images": ["../a.nii"]}})
    with pytest.raises(DataError, match="'../x' cannot name a file"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"file_ending": ".mha"}, "convert the scans"),
        ({"channel_names": ["T1"]}, "'channel_names' should be like"),
        ({"channel_names": {"0": "T1", "1": "t1w"}}, "names a modality twice"),
        ({"labels": {"lesion": "x"}}, "fix them"),
        ({"labels": {"-": 1}}, "fix them"),
        ({"dataset": {"a": {"images": ["imagesTr/a\0.nii.gz"]}}}, "fix them"),
    ],
)
def test_a_bad_dataset_json_is_named(tmp_path, content, says):
    nnunet(tmp_path)
    describe(tmp_path, **NNUNET | {"labels": {"lesion": 1}} | content)
    with pytest.raises(DataError, match=says) as caught:
        open_dataset(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_channels_of_one_file(tmp_path):
    """MSD: voxels of channel c are 10 + c, and each modality is read from its channel."""
    msd(tmp_path)
    data = np.broadcast_to(np.arange(10, 14, dtype=np.int16), (3, 4, 5, 4)).copy()
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / "imagesTr/BRATS_001.nii.gz")
    label = np.zeros((3, 4, 5), np.uint8)
    label[1, 1, 1] = 3
    nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), tmp_path / "labelsTr/BRATS_001.nii.gz")
    dataset = open_dataset(tmp_path)
    scan = read_case(dataset.cases[0], ("t2", "flair", "t1ce"), dataset.labels)
    assert scan.images[:, 0, 0, 0].tolist() == [13, 10, 12]
    assert scan.images.shape == (3, 3, 4, 5) and scan.label is not None and scan.label.max() == 3
    nibabel.save(nibabel.Nifti1Image(data[..., :2], np.eye(4)), tmp_path / "imagesTr/BRATS_001.nii.gz")
    with pytest.raises(DataError, match=r"BRATS_001\.nii\.gz: expected .* 4 channels or more, .* found 3×4×5×2"):
        read_case(dataset.cases[0], ("flair", "t2"), dataset.labels)


def test_one_modality_of_msd_is_a_plain_volume(tmp_path):
    touch(tmp_path, "imagesTr/spleen_10.nii.gz", "labelsTr/spleen_10.nii.gz")
    describe(tmp_path, modality={"0": "CT"}, labels={"0": "background", "1": "spleen"})
    data = open_dataset(tmp_path)
    assert data.cases[0].channels == {} and list(data.cases[0].images) == ["ct"]
    assert data.regions == {"spleen": {1}}


def segmented(root: Path, table: str, text: str) -> None:
    segmentation_without_table(root)
    (root / table).write_text(text)


@pytest.mark.parametrize("table", ["derivatives/x/sub-1/anat/sub-1_dseg.tsv", "derivatives/x/dseg.tsv"])
def test_segmentations_of_bids_have_a_table(tmp_path, table):
    segmented(tmp_path, table, "index\tname\tcolor\n0\tBackground\t#000\n1\tEdema\t#111\n2\tEnhancing tumor\t#222\n")
    data = open_dataset(tmp_path)
    assert data.labels == {1: "oedema", 2: "enhancing"} and list(data.regions) == ["whole", "core", "enhancing"]
    segmented(tmp_path, table, "value,name\n1,x\n")
    with pytest.raises(
        DataError, match=r"dseg\.tsv: expected a tab-separated table with the columns 'index' and 'name'"
    ):
        open_dataset(tmp_path)


def test_masks_of_bids(tmp_path):
    """Images and brain mask in the space of the lesion mask; sidecar; plain mask; two masks."""
    raw, derived = "sub-1/anat/sub-1", "derivatives/x/sub-1/anat/sub-1"
    touch(tmp_path, f"{raw}_FLAIR.nii.gz", f"{raw}_acq-ax_FLAIR.nii.gz", f"{derived}_space-MNI_FLAIR.nii.gz")
    touch(tmp_path, f"{derived}_desc-brain_mask.nii.gz", f"{derived}_space-MNI_desc-brain_mask.nii.gz")
    assert open_dataset(tmp_path).cases[0].label is None
    touch(tmp_path, f"{derived}_space-MNI_mask.nii.gz")
    (case,) = open_dataset(tmp_path).cases
    assert case.label == tmp_path / f"{derived}_space-MNI_mask.nii.gz"
    assert case.images == {"flair": tmp_path / f"{derived}_space-MNI_FLAIR.nii.gz"}
    assert case.brain_mask == tmp_path / f"{derived}_space-MNI_desc-brain_mask.nii.gz"
    touch(tmp_path, f"{raw}_mask.nii.gz")
    with pytest.raises(DataError, match="is a second mask beside"):
        open_dataset(tmp_path)
    touch(tmp_path, f"{derived}_desc-other_mask.nii.gz")
    (tmp_path / f"{derived}_desc-other_mask.json").write_text('{"Type": "Lesion"}')
    (case,) = open_dataset(tmp_path).cases
    assert case.label == tmp_path / f"{derived}_desc-other_mask.nii.gz"
    assert case.images == {"flair": tmp_path / f"{raw}_FLAIR.nii.gz"}


def test_subjects_of_bids_in_two_folders_are_not_merged(tmp_path):
    touch(tmp_path, "sourcedata/sub-01/anat/sub-01_FLAIR.nii.gz")
    assert open_dataset(tmp_path).cases[0].images == {"flair": tmp_path / "sourcedata/sub-01/anat/sub-01_FLAIR.nii.gz"}
    touch(tmp_path, "a/sub-01/anat/sub-01_FLAIR.nii.gz", "masks/sub-01/anat/sub-01_mask.nii.gz")
    touch(tmp_path, "t1/sub-01/anat/sub-01_T1w.nii.gz")
    (tmp_path / "all").mkdir()
    (tmp_path / "all/sub-01").symlink_to(tmp_path / "a/sub-01")
    (case,) = open_dataset(tmp_path).cases
    assert case.label is not None and set(case.images) == {"flair", "t1"}
    assert case.images["flair"].samefile(tmp_path / "a/sub-01/anat/sub-01_FLAIR.nii.gz")
    touch(tmp_path, "b/sub-01/anat/sub-01_FLAIR.nii.gz")
    with pytest.raises(DataError, match=r"b/sub-01/anat/sub-01_FLAIR\.nii\.gz: is of the same subject.*a/sub-01/anat"):
        open_dataset(tmp_path)


def test_one_subject_in_two_bids_sets_is_refused_whatever_the_file_is_named(tmp_path):
    touch(tmp_path, "a/sub-01/anat/sub-01_FLAIR.nii.gz", "b/sub-01/anat/sub-01_acq-3d_FLAIR.nii.gz")
    with pytest.raises(DataError, match=r"b/sub-01/anat/sub-01_acq-3d_FLAIR\.nii\.gz: is of the same subject"):
        open_dataset(tmp_path)


def test_images_of_one_subject_in_two_spaces_may_be_in_two_folders(tmp_path):
    """A link to a scan is no second one; the image in the space of the mask is used."""
    touch(tmp_path, "raw/sub-01/anat/sub-01_FLAIR.nii.gz")
    (tmp_path / "train/sub-01/anat").mkdir(parents=True)
    (tmp_path / "train/sub-01/anat/sub-01_FLAIR.nii.gz").symlink_to(tmp_path / "raw/sub-01/anat/sub-01_FLAIR.nii.gz")
    touch(tmp_path, *(f"mni/sub-01/anat/sub-01_space-MNI_{name}.nii.gz" for name in ("FLAIR", "label-lesion_mask")))
    (case,) = open_dataset(tmp_path).cases
    assert case.images["flair"].name == "sub-01_space-MNI_FLAIR.nii.gz" and case.label is not None


@pytest.mark.parametrize(("scanned", "annotated"), ["ab", "ba"])
def test_masks_of_one_bids_set_are_not_those_of_another(tmp_path, scanned, annotated):
    touch(tmp_path, f"{scanned}/sub-01/anat/sub-01_FLAIR.nii.gz", f"{annotated}/sub-01/anat/sub-01_T1w.nii.gz")
    touch(tmp_path, f"{annotated}/derivatives/x/sub-01/anat/sub-01_label-lesion_mask.nii.gz")
    assert open_dataset(tmp_path).cases[0].label is None


def test_the_masks_beside_a_bids_set_come_before_those_within(tmp_path):
    touch(tmp_path, "rawdata/sub-01/anat/sub-01_FLAIR.nii.gz")
    mask = "derivatives/manual/sub-01/anat/sub-01_label-lesion_mask.nii.gz"
    touch(tmp_path, mask, "rawdata/derivatives/lst/sub-01/anat/sub-01_label-lesion_mask.nii.gz")
    assert open_dataset(tmp_path).cases[0].label == tmp_path / mask


def test_originals_of_a_bids_set_are_no_layout_of_their_own(tmp_path):
    touch(tmp_path, "sub-01/anat/sub-01_FLAIR.nii.gz", "sourcedata/wmh2017/training/Utrecht/0/pre/FLAIR.nii.gz")
    assert open_dataset(tmp_path).layout == "bids"


def test_the_folder_above_a_bids_set_finds_its_masks(tmp_path):
    bids(tmp_path / "set")
    touch(tmp_path, "set/derivatives/manual/sub-01/ses-1/anat/sub-01_ses-1_desc-brain_mask.nii.gz")
    assert open_dataset(tmp_path).cases == open_dataset(tmp_path / "set").cases
    assert open_dataset(tmp_path).cases[0].brain_mask is not None


def test_names_of_bids_may_hold_dashes(tmp_path):
    touch(tmp_path, "sub-A-02/anat/sub-A-02_FLAIR.nii.gz", "sub-1/ses-2020-01/anat/sub-1_ses-2020-01_FLAIR.nii.gz")
    touch(tmp_path, "sub-1.bak/anat/sub-1_FLAIR.nii.gz", "sub-1 (copy)/anat/sub-1_FLAIR.nii.gz")
    assert open_dataset(tmp_path).patients == {"sub-A-02": "sub-A-02", "sub-1_ses-2020-01": "sub-1"}


def test_a_mask_of_bids_that_is_none_of_lesions(tmp_path):
    """Masks of anatomy are no labels, beside those of lesions of other subjects and in a session named after one."""
    touch(tmp_path, *(f"sub-{n}/anat/sub-{n}_FLAIR.nii.gz" for n in (1, 2)))
    touch(tmp_path, *(f"derivatives/x/sub-{n}/anat/sub-{n}_desc-ribbon_mask.nii.gz" for n in (1, 2)))
    touch(tmp_path, "sub-3/ses-stroke/anat/sub-3_ses-stroke_FLAIR.nii.gz")
    touch(tmp_path, "derivatives/x/sub-3/ses-stroke/anat/sub-3_ses-stroke_desc-brain_mask.nii.gz")
    assert all(case.label is None for case in open_dataset(tmp_path).cases)
    touch(tmp_path, "derivatives/x/sub-1/anat/sub-1_label-lesion_mask.nii.gz", "sub-2/anat/sub-2_mask.nii.gz")
    labels = {case.id: case.label and case.label.name for case in open_dataset(tmp_path).cases}
    assert labels == {"sub-1": "sub-1_label-lesion_mask.nii.gz", "sub-2": None, "sub-3_ses-stroke": None}


def test_a_folder_that_cannot_be_read_is_reported(tmp_path, monkeypatch, caplog):
    """Once, although each layout looks into it; a user who runs as root can read all."""
    touch(tmp_path, *(f"HGG/Brats18_{n}_1/Brats18_{n}_1_flair.nii.gz" for n in "AB"))
    entries = Path.iterdir

    def iterdir(folder: Path) -> Iterator[Path]:
        if folder.name == "Brats18_B_1":
            raise PermissionError(13, "Permission denied")
        return entries(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert [case.id for case in open_dataset(tmp_path, needs_labels=False).cases] == ["Brats18_A_1"]
    assert caplog.text.count(f"{tmp_path}/HGG/Brats18_B_1: cannot be read (Permission denied)") == 1


def test_a_manifest(tmp_path):
    manifest(tmp_path)
    path = tmp_path / "scans.csv"
    assert set(detect_layouts(path)) == {"manifest"}
    with pytest.raises(DataError, match=r"scans\.csv: \(manifest\) does not define the meaning of its label values"):
        open_dataset(path)
    data = open_dataset(path, label_map={1: "lesion"})
    first, second = data.cases
    assert (first.id, first.images) == ("A-1", {"flair": tmp_path / "a/f.nii.gz"})
    assert (first.label, first.brain_mask) == (tmp_path / "a/l.nii.gz", tmp_path / "a/b.nii.gz")
    assert second.label is None and second.brain_mask is None
    assert data.regions == {"lesion": {1}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name,flair\nA,f2.nii.gz\n", "has no column 'id' .*'name,flair'"),
        ("id;flair\nA;f2.nii.gz\n", "has no column 'id' .*by commas"),
        ("id,label\nA,f2.nii.gz\n", "no modality column"),
        ("id,flair,FLAIR\nA,f2.nii.gz,f2.nii.gz\n", "two columns have the name 'flair'"),
        ("id,flair\nA,nowhere.nii.gz\n", "line 2: flair .*nowhere.nii.gz: no such file"),
        ("id,flair,label\nA,f2.nii.gz,a\n", "line 2: label .*a: no such file"),
        ("id,flair\nA,f2.nii.gz\nA,f2.nii.gz\n", "line 3: id 'A' is a duplicate"),
        ("id,flair\n../A,f2.nii.gz\n", "'../A' cannot name a file"),
        ("id,flair\n,f2.nii.gz\n", "'' cannot name a file"),
        ("id,flair\nA\n", "line 2: has 1 cells for 2 columns"),
        ("id,flair,t1\nA,,\n", "line 2: case 'A' has no scan"),
        ("id,flair\n", "lists no case"),
        ("", "has no column 'id'"),
    ],
)
def test_a_bad_manifest_is_named(tmp_path, text, says):
    manifest(tmp_path)
    path = tmp_path / "scans.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=says) as caught:
        open_dataset(path, label_map={1: "lesion"})
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_data_is_reported(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        open_dataset(tmp_path / "nowhere", "brats")
    with pytest.raises(DataError, match="no case of the layout 'brats'; expected HGG/"):
        open_dataset(tmp_path, "brats")
    with pytest.raises(DataError, match="none of the known layouts .* give the folder that holds all cases"):
        open_dataset(tmp_path)
    touch(tmp_path, "table.xlsx")
    with pytest.raises(DataError, match="none of the known layouts"):
        open_dataset(tmp_path / "table.xlsx")


def test_duplicates_are_refused(tmp_path):
    for grade in ("HGG", "LGG"):
        underscored(tmp_path / "a", f"{grade}/Brats18_A_1")
    with pytest.raises(DataError, match="two cases have the id 'Brats18_A_1'"):
        open_dataset(tmp_path / "a", "brats")
    touch(tmp_path / "b", *(f"patient01/FLAIR{suffix}" for suffix in (".nii", ".nii.gz")))
    with pytest.raises(DataError, match=r"FLAIR\.nii\.gz: has the same stem as FLAIR\.nii;"):
        open_dataset(tmp_path / "b")


def test_unfinished_and_hidden_folders_are_ignored(tmp_path):
    underscored(tmp_path, "HGG/Brats18_A_1")
    touch(tmp_path, "HGG/.Brats18_C_1-tmp/Brats18_C_1/Brats18_C_1_flair.nii.gz", "HGG/Brats18_D_1/readme.txt")
    assert [case.id for case in open_dataset(tmp_path).cases] == ["Brats18_A_1"]


@pytest.mark.parametrize("name", ["brats2018", "wmh2017", "bids", "msd"])
def test_circular_links_and_unreadable_folders_are_ignored(tmp_path, name, monkeypatch):
    make, layout, ids, *_ = KNOWN[name]
    make(tmp_path)
    for link, target in {"up": tmp_path, "self": tmp_path / "self", "brats_data": tmp_path, "gone": "/nowhere"}.items():
        (tmp_path / link).symlink_to(target)
    (tmp_path / "locked" / "inside").mkdir(parents=True)
    listed = Path.iterdir

    def iterdir(path: Path):
        if path.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert set(detect_layouts(tmp_path)) == {layout}
    assert {case.id for case in open_dataset(tmp_path, layout).cases} == set(ids)


def test_missing_regions_are_refused(tmp_path):
    underscored(tmp_path, "HGG/Brats18_A_1")
    data = open_dataset(tmp_path, "brats")
    assert data.region_values(None) == {"whole": {1, 2, 4}}
    assert data.region_values(["core", "enhancing"]) == {"core": {1, 4}, "enhancing": {4}}
    with pytest.raises(DataError, match="'lesion' is not one of whole, core, enhancing"):
        data.region_values(["lesion"])
    (tmp_path / "HGG/Brats18_A_1/Brats18_A_1_seg.nii.gz").unlink()
    with pytest.raises(DataError, match="no case has a label"):
        open_dataset(tmp_path).region_values(None)
