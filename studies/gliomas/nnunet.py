"""nnU-Net on the cases of a run, as a user of nnU-Net would train it, within a number of minutes.

In an environment of its own (`pip install nnunetv2`), since nnU-Net is no dependency of this project:

$ python studies/gliomas/nnunet.py DATA RUN/split.json OUT --configuration 2d --minutes 4 --role validation

DATA is a folder in nnU-Net's raw layout, RUN any run of `dwp-pyro` with the same draw of the training cases. nnU-Net
plans, preprocesses, trains and predicts with its defaults, except that the number of iterations is what fits into the
minutes (measured on the first iterations), its learning-rate schedule ends there, and only the first channel (FLAIR) is
used. OUT receives `<case>_prob.nii.gz` and `<case>_seg.nii.gz` for `measure.py`, and `nnunet.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

_EPOCHS = 40  # in which nnU-Net lowers its learning rate
_TIMED = 3  # iterations that are timed, after a first one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("split", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--configuration", choices=("2d", "3d_fullres"), default="3d_fullres")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--role", choices=("validation", "test"), default="validation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    split = json.loads(arguments.split.read_text())
    work = (arguments.out / "work").resolve()
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(work / name)
    os.environ.update({"nnUNet_n_proc_DA": str(arguments.threads)})  # also the threads of its planner
    os.environ.setdefault("nnUNet_compile", "false")
    _write_raw(arguments.data, split, work)
    trainer, seconds = _train(arguments, split, work)
    start = time.monotonic()
    _predict(arguments, trainer.output_folder, split[arguments.role])
    record = {
        "configuration": arguments.configuration,
        "minutes": seconds / 60,
        "iterations": trainer.num_epochs * trainer.num_iterations_per_epoch,
        "patch": list(trainer.configuration_manager.patch_size),
        "batch": trainer.batch_size,
        "seconds_to_predict": time.monotonic() - start,
        "device": arguments.device,
        "threads": arguments.threads,
    }
    (arguments.out / "nnunet.json").write_text(json.dumps(record, indent=2))
    print(record)


def _write_raw(data: Path, split: dict[str, list[str]], work: Path) -> None:
    """Write the training and validation cases as Dataset001."""
    about = json.loads((data / "dataset.json").read_text())
    folder = work / "raw" / "Dataset001_Gliomas"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    ending = about["file_ending"]
    cases = [*split["train"], *split["validation"]]
    for case in cases:
        shutil.copy(data / "imagesTr" / f"{case}_0000{ending}", folder / "imagesTr")
        shutil.copy(data / "labelsTr" / f"{case}{ending}", folder / "labelsTr")
    about |= {"channel_names": {"0": "FLAIR"}, "numTraining": len(cases)}
    about.pop("dataset", None)
    (folder / "dataset.json").write_text(json.dumps(about))


def _train(arguments: argparse.Namespace, split: dict[str, list[str]], work: Path):
    """Plan, preprocess and train; return the trainer and the seconds of its training."""
    import torch
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    from nnunetv2.run.run_training import get_trainer_from_args

    torch.set_num_threads(arguments.threads)
    extract_fingerprints([1], num_processes=1)
    plans = plan_experiments([1])
    preprocess([1], plans or "nnUNetPlans", configurations=[arguments.configuration], num_processes=[1])
    folds = [{"train": split["train"], "val": split["validation"]}]
    (work / "preprocessed" / "Dataset001_Gliomas" / "splits_final.json").write_text(json.dumps(folds))

    os.environ.update({"nnUNet_n_proc_DA": "0"})  # augment in the process that trains: the minutes are of one process

    def trainer():
        return get_trainer_from_args("1", arguments.configuration, 0, device=torch.device(arguments.device))

    timed = trainer()
    timed.on_train_start()
    marks = []
    for _ in range(1 + _TIMED):
        timed.train_step(next(timed.dataloader_train))
        marks.append(time.monotonic())
    per_iteration = (marks[-1] - marks[0]) / _TIMED
    iterations = max(1, round(60 * arguments.minutes / per_iteration))
    trained = trainer()
    trained.num_iterations_per_epoch = -(-iterations // _EPOCHS)
    trained.num_epochs = max(1, iterations // trained.num_iterations_per_epoch)
    trained.num_val_iterations_per_epoch = 1
    start = time.monotonic()
    trained.run_training()
    return trained, time.monotonic() - start


def _predict(arguments: argparse.Namespace, model: str, cases: list[str]) -> None:
    """Predict with nnU-Net's defaults, mirroring included."""
    import nibabel
    import numpy as np
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device(arguments.device), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(Path(model).parent), (0,), "checkpoint_final.pth")
    ending = json.loads((arguments.data / "dataset.json").read_text())["file_ending"]
    files = [[str(arguments.data / "imagesTr" / f"{case}_0000{ending}")] for case in cases]
    outputs = [str((arguments.out / case).resolve()) for case in cases]
    predictor.predict_from_files_sequential(files, outputs, save_probabilities=True)
    for case, (image,) in zip(cases, files, strict=True):
        reference = nibabel.load(image)
        probability = np.load(arguments.out / f"{case}.npz")["probabilities"][1].transpose(2, 1, 0)
        assert probability.shape == reference.shape, (probability.shape, reference.shape)
        prob = nibabel.Nifti1Image(probability.astype(np.float32), reference.affine)
        nibabel.save(prob, arguments.out / f"{case}_prob.nii.gz")
        (arguments.out / f"{case}{ending}").rename(arguments.out / f"{case}_seg.nii.gz")
        (arguments.out / f"{case}.npz").unlink()
        (arguments.out / f"{case}.pkl").unlink()


if __name__ == "__main__":
    main()
