"""Where the time of a decoding step goes: torch's profiler around vLLM, in one process, without a server.

    python benchmarks/step_profile.py MODEL [--dtype bfloat16] [--streams 1] [--steps 64] [--rows 12]

Prints the milliseconds of one step, wall and processor time, as the median of three generations that are not
profiled; then the operators that take most of a profiled one, as Markdown: their own time within a step, and calls.
"""

import argparse
import os
import statistics
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rows", type=int, default=12)
    arguments = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # the profiler sees this process only

    from requant.markdown import table
    from requant.server import CPU_ENVIRONMENT

    os.environ |= CPU_ENVIRONMENT | dict(os.environ)

    from torch.profiler import ProfilerActivity, profile
    from vllm import LLM, SamplingParams

    llm = LLM(arguments.model, dtype=arguments.dtype, max_model_len=512, enable_prefix_caching=False)
    prompts = [{"prompt_token_ids": [5 + i for i in range(16)]}] * arguments.streams
    sampling = SamplingParams(temperature=0, max_tokens=arguments.steps, ignore_eos=True)

    def generate() -> tuple[float, float]:
        """Milliseconds of a step: wall, processor."""
        wall, processor = time.perf_counter(), time.process_time()
        llm.generate(prompts, sampling, use_tqdm=False)
        factor = 1e3 / arguments.steps
        return (time.perf_counter() - wall) * factor, (time.process_time() - processor) * factor

    generate()  # whatever is compiled or allocated at first
    wall, processor = (statistics.median(times) for times in zip(*(generate() for _ in range(3)), strict=True))
    print(f"{wall:.1f} ms a step, {processor:.1f} ms of processor time\n")
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        generate()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    cells = (
        (event.key, f"{event.self_cpu_time_total / 1e3 / arguments.steps:.2f}", f"{event.count / arguments.steps:.0f}")
        for event in events[: arguments.rows]
    )
    print(table(("operator", "ms a step", "calls a step"), cells))


if __name__ == "__main__":
    main()
