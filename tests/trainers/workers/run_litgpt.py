"""LitGPT: `litgpt finetune_full` with the export's data module."""

import json
import os
import shutil
import sys
from dataclasses import asdict
from importlib.metadata import version

import torch
import yaml
from recording import Recording, arguments, rows, save
from safetensors.torch import load_file


def convert(model, folder):
    """What `litgpt convert_to_litgpt` makes of a model whose name it knows."""
    from litgpt.config import Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

    shutil.copytree(model, folder)
    c = json.loads((model / "config.json").read_text())
    config = Config(
        name="tiny",
        block_size=c["max_position_embeddings"],
        padded_vocab_size=c["vocab_size"],
        vocab_size=c["vocab_size"],
        n_layer=c["num_hidden_layers"],
        n_head=c["num_attention_heads"],
        n_query_groups=c["num_key_value_heads"],
        n_embd=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        norm_eps=c["rms_norm_eps"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    weights = load_file(model / "model.safetensors")
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    converted = {}
    copy_weights_hf_llama(config, {}, converted, weights)
    torch.save(converted, folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text(yaml.safe_dump(asdict(config)))


def unpadded(ids, known):
    """1 where a row of known ids is, 0 where zeros pad it: a zero may also be the last word."""
    length = max(n for n in range(1, len(ids) + 1) if tuple(ids[:n]) in known and not any(ids[n:]))
    return (torch.arange(len(ids)) < length).long()


def train(export, out, known):
    """The command, in this process."""
    import litgpt.finetune.full as full
    from litgpt.__main__ import main

    recording, loss_of, forward = Recording(), full.chunked_cross_entropy, full.GPT.forward

    def record_forward(gpt, ids, *args, **kwargs):
        recording.now = (gpt, ids.clone())
        return forward(gpt, ids, *args, **kwargs)

    def record_loss(logits, targets, *args, **kwargs):
        loss = loss_of(logits, targets, *args, **kwargs)
        gpt, ids = recording.now
        if gpt.training:
            labels = torch.cat([torch.full_like(targets[:, :1], -100), targets], 1)  # the loss had them moved
            mask = torch.stack([unpadded(row.tolist(), known) for row in ids])
            recording.calls.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
            recording.losses.append(float(loss))
            recording.weights(gpt)
        return loss

    full.chunked_cross_entropy, full.GPT.forward = record_loss, record_forward
    settings = {
        "data": "masked_data.MaskedData",
        "data.data_files": f"{export}/data/*.parquet",
        "out_dir": out / "trained",
        "precision": "32-true",
        "train.global_batch_size": 2,
        "train.micro_batch_size": 2,
        "train.epochs": 1,
        "train.lr_warmup_steps": 1,
        "eval.interval": 1000,
        "eval.max_iters": 1,
    }
    sys.argv = ["litgpt", "finetune_full", str(out / "model")]
    for name, value in settings.items():
        sys.argv += [f"--{name}", str(value)]
    main()
    return recording


if __name__ == "__main__":
    export, model, out = arguments()
    sys.path.insert(0, str(export))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    convert(model, out / "model")
    from masked_data import Rows

    loaded = rows(Rows(f"{export}/data/*.parquet", type("Decoder", (), {"decode": staticmethod(str)})))
    plain = train(export, out, {tuple(ids) for ids, _ in loaded})
    save(out, version=version("litgpt"), loaded=loaded, plain=plain.report())
