"""torchtune: its recipe for full fine-tuning, with the export's dataset class; plain and packed."""

import importlib.util
import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import torchtune
from omegaconf import OmegaConf
from recording import Recording, arguments, rows, save
from safetensors.torch import load_file, save_file

TEXT = """
output_dir: {out}
tokenizer: {{_component_: masked_dataset.NoTokenizer, pad_id: {pad_id}, max_seq_len: 128}}
dataset: {{_component_: masked_dataset.masked_dataset, data_files: "{export}/data/*.parquet", packed: {packed}}}
seed: 0
shuffle: true
model:
  _component_: torchtune.models.llama3.llama3
  vocab_size: {vocab_size}
  num_layers: {num_hidden_layers}
  num_heads: {num_attention_heads}
  num_kv_heads: {num_key_value_heads}
  embed_dim: {hidden_size}
  intermediate_dim: {intermediate_size}
  max_seq_len: {max_position_embeddings}
  norm_eps: {rms_norm_eps}
  rope_base: 10000
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: {out}/model
  checkpoint_files: [model.safetensors]
  output_dir: {out}
  model_type: LLAMA3
resume_from_checkpoint: false
batch_size: {batch_size}
epochs: {epochs}
optimizer: {{_component_: torch.optim.AdamW, lr: 1.0e-3}}
loss: {{_component_: torchtune.modules.loss.CEWithChunkedOutputLoss, num_output_chunks: 1}}
max_steps_per_epoch: null
gradient_accumulation_steps: 1
optimizer_in_bwd: false
clip_grad_norm: null
compile: false
device: cpu
enable_activation_checkpointing: false
enable_activation_offloading: false
dtype: fp32
metric_logger: {{_component_: torchtune.training.metric_logging.DiskLogger, log_dir: {out}/logs}}
log_every_n_steps: 1
log_peak_memory_stats: false
"""


def recipe_class():
    """The recipes are scripts beside the package."""
    path = Path(torchtune.__file__).parents[1] / "recipes" / "full_finetune_single_device.py"
    spec = importlib.util.spec_from_file_location("recipe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FullFinetuneRecipeSingleDevice


def untie(model, folder):
    """torchtune's llama3 has an output layer of its own."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"].clone())
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def train(export, out, **settings):
    """Run the recipe."""
    config = json.loads((out / "model" / "config.json").read_text())
    cfg = OmegaConf.create(TEXT.format(export=export, out=out, **settings, **config))
    recipe = recipe_class()(cfg)
    recipe.setup(cfg)
    recording, step = Recording(), recipe._loss_step

    def loss_step(batch):
        recording.weights(recipe._model)
        call = {"input_ids": batch["tokens"].clone(), "labels": batch["labels"].clone()}
        call["attention_mask"] = (call["input_ids"] != settings["pad_id"]).long()
        if "input_pos" in batch:  # a pack
            call["position_ids"] = batch["input_pos"].clone()
        recording.calls.append(call)
        loss = step(batch)
        recording.losses.append(float(loss))
        return loss

    recipe._loss_step = loss_step
    recipe.train()
    return recording, recipe._dataloader.dataset


if __name__ == "__main__":
    export, model, out = arguments()
    sys.path.insert(0, str(export))
    untie(model, out / "model")
    pad_id = json.loads((model / "config.json").read_text())["vocab_size"] - 1  # no word of the tests
    plain, loaded = train(export, out, packed="false", batch_size=2, epochs=1, pad_id=pad_id)
    packed, _ = train(export, out, packed="true", batch_size=1, epochs=1, pad_id=pad_id)
    loaded = [{"input_ids": row["tokens"], "labels": row["labels"]} for row in loaded]
    save(out, version=version("torchtune"), loaded=rows(loaded), plain=plain.report(), packed=packed.report())
