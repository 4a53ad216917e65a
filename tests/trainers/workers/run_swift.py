"""ms-swift: `swift sft` with the export's template, plain; its packing code by itself."""

import os
from importlib.metadata import version

from recording import Recording, arguments, save

if __name__ == "__main__":
    export, model, out = arguments()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.chdir(export)
    from swift import sft_main

    settings = {
        "model": model,
        "model_type": "llama",
        "dataset": export / "data",
        "external_plugins": export / "masked_template.py",
        "template": "token_masked",
        "max_length": 128,
        "split_dataset_ratio": 0,
        "tuner_type": "full",
        "torch_dtype": "float32",
        "attn_impl": "sdpa",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "output_dir": out / "trained",
    }
    with Recording().of_transformers() as plain:
        sft_main([text for name, value in settings.items() for text in (f"--{name}", str(value))])
    report = plain.report()
    loaded = [row for step in report["steps"] for row in step]
    save(out, version=version("ms-swift"), loaded=loaded, plain=report)
