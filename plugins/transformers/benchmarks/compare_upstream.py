"""Time against Transformers' own ``generate``, plain and speculative: the same pair, prompt, k and process, greedy.

The four sides run in turn, ``--repeats`` times. ``time_over_transformers`` is the median ratio of neighbouring
speculative runs. Outputs are compared too: a speed without the same tokens would mean nothing.

    python plugins/transformers/benchmarks/compare_upstream.py --pairs tiny-e2b --num-threads 1 --save cpu
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polydraft
import torch
from polydraft_builtin_pairs import prompts

sys.path.insert(0, str(Path(__file__).parents[3] / "ci"))
from benchmarks import Recorder, in_turn, parser

SIDES = ("polydraft", "transformers", "polydraft, plain", "transformers, plain")
Run = Callable[[], tuple[list[int], float | None]]
"""Returns the new tokens and, where it is counted, the mean acceptance length."""


def sides(session: Any, prompt: list[int], new_tokens: int, k: int) -> dict[str, Run]:
    """One function per side."""
    target = session.engine.target.model
    assistant = session.engine.drafter_model
    assistant.generation_config.num_assistant_tokens = k
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    device = target.device

    def ours(speculate: str) -> Run:
        def run() -> tuple[list[int], float | None]:
            result = session.generate(prompt, max_new_tokens=new_tokens, ignore_eos=True, speculate=speculate)
            return list(result.token_ids), result.stats.mean_acceptance_length

        return run

    def upstream(drafter: Any) -> Run:
        def run() -> tuple[list[int], float | None]:
            with torch.inference_mode():
                found = target.generate(
                    torch.tensor([prompt], device=device),
                    attention_mask=torch.ones((1, len(prompt)), dtype=torch.long, device=device),
                    assistant_model=drafter,
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            return found[0, len(prompt) :].tolist(), None

        return run

    return dict(zip(SIDES, (ours("on"), upstream(assistant), ours("off"), upstream(None)), strict=True))


def timed(run: Run) -> Callable[[], tuple[float, list[int], float | None]]:
    """The function, with the seconds that it takes in front of what it returns."""

    def measured() -> tuple[float, list[int], float | None]:
        started = time.perf_counter()
        tokens, length = run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started, tokens, length

    return measured


def main() -> None:
    """Measure each pair in each dtype."""
    options = parser(__doc__)
    options.add_argument("--pairs", nargs="+", default=["tiny-e2b", "tiny-31b", "tiny-26b"])
    options.add_argument("--dtypes", nargs="+", default=["float32"])
    options.add_argument("-k", type=int, default=4)
    options.add_argument("--new-tokens", type=int, default=96)
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--device", default="cpu")
    options.add_argument("--num-threads", type=int)
    given = options.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    record = Recorder(
        __file__,
        __doc__,
        given,
        packages=("torch", "transformers"),
        accelerator=torch.cuda.get_device_name() if given.device.startswith("cuda") else None,
        threads=given.num_threads or torch.get_num_threads(),
    )
    prompt_text = prompts()[0].text or ""
    for pair, dtype in ((pair, dtype) for pair in given.pairs for dtype in given.dtypes):
        with polydraft.load(
            f"builtin:{pair}",
            backend="transformers",
            dtype=dtype,
            device=given.device,
            num_speculative_tokens=given.k,
            engine_options={"num_threads": given.num_threads},
            prefix_cache_bytes=0,
        ) as session:
            prompt = [2, *session.tokenizer.encode(prompt_text)]
            functions = sides(session, prompt, given.new_tokens, given.k)
            found = in_turn({side: timed(run) for side, run in functions.items()}, given.repeats)
        tokens = {side: runs[-1][1] for side, runs in found.items()}
        ratios = [ours[0] / theirs[0] for ours, theirs in zip(*(found[side] for side in SIDES[:2]), strict=True)]
        for side, runs in found.items():
            values = {
                "mean_acceptance_length": runs[-1][2],
                "same_tokens": all(other == tokens["polydraft"] for other in tokens.values()),
            }
            if side == "polydraft":
                values["time_over_transformers"] = round(statistics.median(ratios), 3)
            record.row({"pair": pair, "dtype": dtype, "side": side}, values, {"seconds": [run[0] for run in runs]})


if __name__ == "__main__":
    main()
