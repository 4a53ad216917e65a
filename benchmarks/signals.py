"""What the signals of one distribution cost on top of the loss, in one process on the CPU, sides in turns.

CPU time of a `Scorer` on a random Llama (8 layers x 512, vocabulary 32,000) or a model of yours: the loss alone, the
signals of one pass but `expected_rank`, all of one pass, and `varentropy`, which takes a second one. `--exact`: how
far each signal is from that of the model in float64.
"""

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np

from benchmarks.rounds import at_least


def main() -> None:
    """Print the ratio of medians of each side to the loss alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a third of the rows")
    parser.add_argument("--rounds", type=int, default=3, help="at least 3")
    parser.add_argument("--layers", type=int, default=8, help="of the random model")
    parser.add_argument("--width", type=int, default=512, help="of the random model")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--model", help="a folder or Hub id, in bfloat16, instead of a random model")
    parser.add_argument("--exact", action="store_true", help="float32 against float64 instead of the cost")
    args = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from sstoken.measure.distribution import BY_ROW, OF_DISTRIBUTION
    from sstoken.measure.scorer import Scorer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = 8 if args.quick else 24
    config = LlamaConfig(
        vocab_size=32000, hidden_size=args.width, intermediate_size=3 * args.width, num_hidden_layers=args.layers,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    if args.model:
        dtype = torch.float32 if args.exact else torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    else:
        model = LlamaForCausalLM(config).eval()
    entries = model.get_input_embeddings().weight.shape[0]
    random = np.random.default_rng(0)
    sequences = [random.integers(3, entries, 200).astype(np.int32) for _ in range(rows)]
    masks = [np.arange(200) >= 80 for _ in sequences]
    if args.exact:
        single = measure(model, sequences, masks)
        facts = {
            name: float(np.abs(values.astype(np.float64) - single[name]).max())
            for name, values in measure(model.double(), sequences, masks).items()
        }
        print(json.dumps(facts) if args.json else "  ".join(f"{k} {v:.1e}" for k, v in facts.items()))
        return
    sides = {
        "loss": ("loss",),
        "all of one pass but expected_rank": tuple(OF_DISTRIBUTION - {"expected_rank", *BY_ROW}),
        "all of one pass": tuple(OF_DISTRIBUTION - {*BY_ROW}),
        "varentropy": ("varentropy",),
    }
    scorers = {name: Scorer(model, signals=signals, batch_tokens=768) for name, signals in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(at_least(args.rounds) + 1):
        for name, scorer in scorers.items():
            start = time.process_time()
            list(scorer.measure(sequences, masks))
            if round_number:  # the first warms up
                seconds[name].append(time.process_time() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    facts = {name: round(value / median["loss"], 3) for name, value in median.items()}
    print(json.dumps(facts) if args.json else "  ".join(f"{k} {v:.2f}x" for k, v in facts.items()))


def measure(model: Any, sequences: list[Any], masks: list[Any]) -> dict[str, Any]:
    """All signals of one distribution, of all response tokens."""
    from sstoken.measure.distribution import OF_DISTRIBUTION
    from sstoken.measure.scorer import Scorer

    found = dict(Scorer(model, signals=sorted(OF_DISTRIBUTION)).measure(sequences, masks))
    return {name: np.concatenate([found[i][name] for i in sorted(found)]) for name in sorted(OF_DISTRIBUTION)}


if __name__ == "__main__":
    main()
