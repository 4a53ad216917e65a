"""Axolotl: `axolotl train` on the export's own configuration, plain and with sample packing."""

import os
from importlib.metadata import version

import yaml
from recording import Recording, arguments, rows, save


def train(export, model, out, name, **settings):
    """As the command does, with what a CPU needs."""
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train
    from axolotl.common.datasets import load_datasets

    config = yaml.safe_load((export / "axolotl.yaml").read_text())
    config |= {
        "base_model": str(model),
        "output_dir": str(out / name),
        "dataset_prepared_path": str(out / f"prepared-{name}"),
        "use_cpu": True,
        "bf16": False,
        "attn_implementation": "sdpa",
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "save_strategy": "no",
        **settings,
    }
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    with Recording().of_transformers() as recording:
        do_train(load_cfg(str(path)), None)
    return recording, load_datasets(cfg=load_cfg(str(path))).train_dataset


if __name__ == "__main__":  # it spawns processes, which import this file
    export, model, out = arguments()
    os.environ.update(CUDA_VISIBLE_DEVICES="", AXOLOTL_DO_NOT_TRACK="1", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1")
    os.chdir(export)
    plain, loaded = train(export, model, out, "plain")
    packing = {"sample_packing": True, "sequence_len": 128, "micro_batch_size": 1, "num_epochs": 3}
    packed, _ = train(export, model, out, "packed", **packing)
    save(
        out,
        version=version("axolotl"),
        loaded=rows(loaded),
        plain=plain.report(),
        packed=packed.report(epochs=3),
    )
